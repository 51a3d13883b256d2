"""The 3D U-Net: shapes, its own loss, saving, loading and folding."""

import pytest
import torch
from transformers import AutoModelForSemanticSegmentation

from hf_adafocal.scaling import Scaling, fold_checkpoint, fold_scaling, recorded_scaling, unfold_scaling
from hf_adafocal.unet import UNet3DConfig, UNet3DForSemanticSegmentation


def network(**config):
    torch.manual_seed(0)
    return UNet3DForSemanticSegmentation(UNet3DConfig(widths=[4, 6, 8], num_labels=3, **config)).eval()


@pytest.fixture
def volumes():
    return torch.randn(2, 1, 6, 9, 11, generator=torch.Generator().manual_seed(0))


class TestUNet3D:
    def test_logits_have_the_size_of_the_volume_whatever_it_is(self, volumes):
        assert network()(volumes).logits.shape == (2, 3, 6, 9, 11)
        assert network()(volumes[..., :1, :1, :1]).logits.shape == (2, 3, 1, 1, 1)

    def test_its_own_loss_is_the_cross_entropy_of_the_voxels_that_count(self, volumes):
        labels = torch.randint(0, 3, (2, 6, 9, 11))
        labels[0] = 255
        outputs = network()(volumes, labels=labels)
        expected = torch.nn.functional.cross_entropy(outputs.logits[1:], labels[1:])
        torch.testing.assert_close(outputs.loss, expected)

    def test_a_saved_checkpoint_loads_through_the_auto_class(self, volumes, tmp_path):
        model = network()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(volumes).logits, model(volumes).logits)
        assert (tmp_path / "unet.py").exists()

    def test_a_scaling_is_folded_into_its_head_and_out_of_it(self, volumes):
        model = network()
        before = model(volumes).logits
        fold_scaling(model, Scaling(scale=(0.5, 2.0, 1.0), bias=(0.1, 0.0, -0.3)))
        factors, offsets = (torch.tensor(part)[:, None, None, None] for part in ((0.5, 2.0, 1.0), (0.1, 0.0, -0.3)))
        torch.testing.assert_close(model(volumes).logits, before * factors + offsets)
        unfold_scaling(model)
        torch.testing.assert_close(model(volumes).logits, before, rtol=1e-4, atol=1e-5)

    def test_a_checkpoint_is_folded_on_disk(self, volumes, tmp_path):
        model = network()
        model.save_pretrained(tmp_path / "plain")
        fold_checkpoint(tmp_path / "plain", Scaling(0.5), tmp_path / "folded")
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "folded")
        torch.testing.assert_close(loaded(volumes).logits, model(volumes).logits / 2)
        assert recorded_scaling(loaded) is not None
