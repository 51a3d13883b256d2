"""Private parts of transformers' Trainer on which this library stands, and what breaks without each.

They have no promise of stability, so `transformers` is bounded by the next major version, and continuous integration
runs these tests on the lowest supported and on the newest release.
"""

import ast
import functools
import inspect
from pathlib import Path

import pytest
import tiny
from transformers import Trainer

import hf_adafocal.training
from hf_adafocal import AdaFocalTrainer
from hf_adafocal.training.hub_uploads import UploadingTrainer
from hf_adafocal.training.resumable import ResumableTrainer
from hf_adafocal.training.search import SearchingTrainer

TRAINING = Path(hf_adafocal.training.__file__).parent
NEEDS_RUN_EPOCH = pytest.mark.skipif(
    not hasattr(Trainer, "_run_epoch"), reason="this release of transformers has no Trainer._run_epoch"
)

# name: (class of ours that overrides it, what breaks if the Trainer no longer calls it)
OVERRIDDEN = {
    "_get_num_items_in_batch": (
        AdaFocalTrainer,
        "the loss of a step is divided by the number of labels, not by the sum of their class weights, and every "
        "evaluation batch waits for a collective",
    ),
    "_hp_search_setup": (
        SearchingTrainer,
        "each trial of a hyper-parameter search goes on with the loss and the gammas of the trial before it",
    ),
    "_push_from_checkpoint": (
        UploadingTrainer,
        "every save uploads the whole output folder: `training_args.bin` with the token, event files, what a link "
        "leads to, and the report of an earlier run beside the new weights",
    ),
    "_run_epoch": (
        ResumableTrainer,
        "a run that `max_steps` ended within an epoch takes one more step when it is resumed from its last checkpoint "
        "(so it does on releases without this method)",
    ),
    "_save_checkpoint": (
        ResumableTrainer,
        "`trainer_state.json` of an earlier run in the same folder vouches for a checkpoint that is half written",
    ),
    "_save_rng_state": (
        ResumableTrainer,
        "a checkpoint looks complete before every process has written its random state",
    ),
}

# name: what breaks if the Trainer no longer has it
USED = {
    "_finish_current_push": "the last upload does not wait for those of the checkpoints, and may be overtaken by one",
    "_get_collator_with_removed_columns": "slices of the calibration set hold columns the model does not take",
    "_get_output_dir": "the folder of a checkpoint in a hyper-parameter search is not found",
    "_prepare_inputs": "batches of our own forward passes stay on the CPU",
    "_set_signature_columns_if_needed": "rows count as different that differ in a column the model does not take",
    "_signature_columns": "the same",
}


def trees() -> list[ast.AST]:
    return [ast.parse(path.read_text()) for path in TRAINING.glob("*.py")]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def of_the_trainer() -> set[str]:
    """Private methods of the Trainer, and private attributes that its methods set."""
    found = set(vars(Trainer)) | {"_run_epoch"}
    for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(Trainer)))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return {name for name in found if is_private(name)}


class TestTable:
    def test_it_names_every_private_method_that_a_class_of_ours_overrides(self):
        overridden = {
            name
            for owner in AdaFocalTrainer.__mro__
            if issubclass(owner, Trainer) and owner is not Trainer
            for name in vars(owner)
        }
        assert overridden & of_the_trainer() == set(OVERRIDDEN)

    def test_it_names_every_private_method_and_attribute_that_is_used(self):
        used = set()
        for node in (node for tree in trees() for node in ast.walk(tree)):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in {"self", "trainer", "run", "super()"}:
                used.add(node.attr)
        assert used & of_the_trainer() - set(OVERRIDDEN) == set(USED)

    @pytest.mark.parametrize("name", [*OVERRIDDEN, *USED])
    def test_the_trainer_has_it(self, name, tmp_path):
        if name == "_run_epoch" and not hasattr(Trainer, name):
            pytest.skip("the documented limit of this release")
        assert hasattr(Trainer, name) or hasattr(tiny.trainer(tmp_path), name), (OVERRIDDEN | USED)[name]

    @pytest.mark.parametrize("name", [name for name in OVERRIDDEN if name != "_run_epoch"])
    def test_ours_takes_the_arguments_of_the_trainers(self, name):
        ours, theirs = (inspect.signature(getattr(owner, name)).parameters for owner in (AdaFocalTrainer, Trainer))
        assert list(ours) == list(theirs), OVERRIDDEN[name][1]


class TestCalls:
    @pytest.fixture(scope="class")
    def called(self, tmp_path_factory):
        """Names of our overrides that a run of two epochs with checkpoints reached."""
        names = set()

        def counted(name, method):
            def call(*args, **kwargs):
                names.add(name)
                return method(*args, **kwargs)

            return call

        run = tiny.trainer(tmp_path_factory.mktemp("run"), save_strategy="epoch", eval_strategy="epoch")
        run.args.push_to_hub = True  # after construction, which would make a repository
        for name in OVERRIDDEN:
            method = (lambda folder: None) if name == "_push_from_checkpoint" else getattr(run, name)
            setattr(run, name, counted(name, method))
        run.train()
        return names

    @pytest.mark.parametrize(
        "name", [pytest.param(n, marks=NEEDS_RUN_EPOCH if n == "_run_epoch" else ()) for n in OVERRIDDEN]
    )
    def test_the_trainer_calls_what_is_overridden(self, called, name):
        assert name in called, f"{OVERRIDDEN[name][0].__name__}.{name} is never called: {OVERRIDDEN[name][1]}"
