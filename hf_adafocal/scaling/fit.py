"""Temperature and vector scaling, fitted on held-out logits by minimising the NLL."""

import dataclasses
import math
import warnings
from typing import Any, overload

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import minimize, minimize_scalar
from scipy.stats import chi2
from torch import Tensor

LOG_TEMPERATURE_BOUND = 5.0  # T between 1/148 and 148
ROUNDING = 1e-9  # nats; an NLL that rises by more was made worse


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Post-hoc scaling of logits, `scale * logits + bias`, with the NLL before and after on the set it was fitted on.

    Args:
        scale: 1 / T, or one factor per class, C numbers.
        bias: Added after the factor, in nats: 0; one number per class; or, of Platt scaling, a number that is added to
            the logit of the positive class, the second of two or the only one.
        nll_before: Mean NLL of the samples it was fitted on, as they came, in nats.
        nll_after: The same with the scaling; of the same samples, so a little flattering.
        num_samples: How many samples it was fitted on.

    Raises:
        ValueError: If a number is not finite, a factor is 0, or the lengths of `scale` and `bias` differ.

    >>> Scaling(scale=0.5).apply([[2.0, -4.0]])
    array([[ 1., -2.]], dtype=float32)
    """

    scale: float | tuple[float, ...]
    bias: float | tuple[float, ...] = 0.0
    nll_before: float | None = None
    nll_after: float | None = None
    num_samples: int | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "bias"):
            value = np.asarray(getattr(self, name), dtype=float)
            if value.ndim > 1 or not np.isfinite(value).all():
                raise ValueError(f"{name} must be a finite number or one per class, found {getattr(self, name)}.")
            object.__setattr__(self, name, tuple(value.tolist()) if value.ndim else value.item())
        if not np.all(self.scale):
            raise ValueError(f"scale must not be 0, which cannot be undone, found {self.scale}.")
        if isinstance(self.scale, tuple) and isinstance(self.bias, tuple) and len(self.scale) != len(self.bias):
            raise ValueError(f"scale and bias must be of one length, found {len(self.scale)} and {len(self.bias)}.")

    @property
    def method(self) -> str:
        """Name of the method: `"temperature"`, `"platt"` with a bias, or `"vector"` with numbers for each class."""
        if isinstance(self.scale, tuple) or isinstance(self.bias, tuple):
            return "vector"
        return "platt" if self.bias else "temperature"

    def bias_of(self, num_logits: int) -> float | tuple[float, ...]:
        """Return the bias of each logit of a head.

        Raises:
            ValueError: If it is one of Platt scaling, and there are more than two logits.

        >>> Scaling(0.5, 1.0).bias_of(2), Scaling(0.5, 1.0).bias_of(1)
        ((0.0, 1.0), 1.0)
        """
        if self.method != "platt" or num_logits == 1:
            return self.bias
        if num_logits != 2:
            raise ValueError(f"Platt scaling is for two classes, or a single logit, found {num_logits} logits.")
        return (0.0, self.bias)  # type: ignore[return-value]

    @overload
    def apply(self, logits: Tensor) -> Tensor: ...

    @overload
    def apply(self, logits: Any) -> np.ndarray: ...

    def apply(self, logits: Any) -> Tensor | np.ndarray:
        """Scaled logits.

        Args:
            logits: Shape `(..., C)`; float16 and bfloat16 are computed and returned in float32.

        Returns:
            The same shape; a tensor for a tensor, otherwise an array.
        """
        given, scale, bias = self._beside(logits)
        scaled = given * scale + bias
        return scaled if isinstance(logits, Tensor) else scaled.numpy()

    @overload
    def undo(self, logits: Tensor) -> Tensor: ...

    @overload
    def undo(self, logits: Any) -> np.ndarray: ...

    def undo(self, logits: Any) -> Tensor | np.ndarray:
        """Logits before scaling; the inverse of `apply`.

        Args:
            logits: Scaled logits, shape `(..., C)`.

        Returns:
            The same shape, in float32 or wider; a tensor for a tensor, otherwise an array.

        >>> Scaling(scale=0.5).undo(Scaling(scale=0.5).apply([[2.0, -4.0]]))
        array([[ 2., -4.]], dtype=float32)
        """
        given, scale, bias = self._beside(logits)
        before = (given - bias) / scale
        return before if isinstance(logits, Tensor) else before.numpy()

    def _beside(self, logits: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Convert logits to float32 or wider, and scale and bias to the same dtype and device."""
        given = torch.as_tensor(logits)
        dtype = torch.promote_types(given.dtype, torch.float32)
        bias_of_logits = self.bias_of(given.shape[-1]) if given.ndim else self.bias
        scale, bias = (torch.tensor(value, dtype=dtype, device=given.device) for value in (self.scale, bias_of_logits))
        return given.to(dtype), scale, bias

    def is_supported(self, confidence: float = 0.95) -> bool:
        """Test by the likelihood ratio whether this scaling fits better than unscaled logits.

        Twice the rise of the log-likelihood of the samples it was fitted on is compared with the chi-square quantile
        for as many degrees of freedom as numbers were fitted (1, 2 for Platt scaling, 2 C for a vector scaling).

        Args:
            confidence: Level of the test, in (0, 1).

        Returns:
            True if the samples tell the scaling from the identity. False also where the NLL does not fall.

        Raises:
            ValueError: If the level is out of range, or the scaling does not know what it was fitted on.

        Source: Wilks 1938, The large-sample distribution of the likelihood ratio.

        >>> few, many = (Scaling(0.8, 0.0, 0.50, 0.49, size) for size in (100, 1000))  # chi-square 2 and 20
        >>> few.is_supported(), many.is_supported()
        (False, True)
        """
        if not 0 < confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, found {confidence}; 0.95 stands for 95 %.")
        if self.nll_before is None or self.nll_after is None or self.num_samples is None:
            raise ValueError(
                "Whether a scaling is supported needs nll_before, nll_after and num_samples; take what "
                "fit_temperature_scaling, fit_platt_scaling or fit_vector_scaling returns."
            )
        numbers = (self.scale, self.bias)
        fitted = sum(len(value) if isinstance(value, tuple) else 0 for value in numbers) or (2 if self.bias else 1)
        statistic = 2 * self.num_samples * (self.nll_before - self.nll_after)
        return bool(statistic > chi2.ppf(confidence, fitted))

    def pooler(self) -> dict[str, float]:
        """Return the settings of a server that computes `(logits - logit_mean) / logit_sigma` before its activation.

        Those are the names of vLLM's `PoolerConfig`; they are for a checkpoint in which the scaling is not folded. Of
        Platt scaling they are for a head with a single logit: of two logits, a bias for both is a bias for none.

        Raises:
            ValueError: If the numbers differ by class, or the factor is not above 0.

        >>> Scaling(scale=0.5, bias=1.0).pooler()
        {'logit_mean': -2.0, 'logit_sigma': 2.0}
        """
        if isinstance(self.scale, tuple) or isinstance(self.bias, tuple) or self.scale < 0:
            raise ValueError(
                f"A server's pooler takes one mean and one sigma above 0, found {self.to_dict()}: fold it."
            )
        return {"logit_mean": 0.0 - self.bias / self.scale, "logit_sigma": 1 / self.scale}

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values, with `method` and, where there is one, `temperature`."""
        known = self.method == "temperature" and not isinstance(self.scale, tuple)
        temperature = {"temperature": 1 / self.scale} if known else {}  # type: ignore[operator]
        lists = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {"method": self.method, **temperature, **lists}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Scaling":
        """Read the scaling that `to_dict` wrote.

        Raises:
            ValueError: If the record has no `scale` or a number in it is no scaling.
        """
        if "scale" not in record:
            raise ValueError(f"Expected a scaling as Scaling.to_dict writes it, found {record}.")
        return cls(**{field.name: record[field.name] for field in dataclasses.fields(cls) if field.name in record})


def fit_temperature(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> float:
    """Fit the temperature T that minimises the NLL of `logits / T`.

    A bounded search on log T, so T is positive by construction; the NLL has one minimum in T. A T that does not lower
    the NLL is not returned: then it is 1.

    Args:
        logits: Held-out logits, not probabilities, shape `(N, C)`, N >= 1; -inf for a class that a sample cannot have.
        labels: Class indices in `[0, C)`, shape `(N,)`.

    Returns:
        T, no unit: above 1 softens over-confident predictions. If every sample is classified correctly the NLL has no
        minimum (T would fall to 0 and one later mistake would cost hundreds of nats): T is then 1, with a warning.

    Raises:
        ValueError: If shapes do not fit, a label is no class index, a logit is NaN or infinite, or the logits are
            probabilities.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2.

    >>> logits = torch.tensor([[4.0, 0.0]] * 4)
    >>> round(fit_temperature(logits, torch.tensor([0, 0, 0, 1])), 3)  # 4 / T = log 3
    3.641
    """
    logits, labels = checked(logits, labels)
    if _all_right(logits, labels):
        warnings.warn(
            f"All {len(labels)} held-out samples are classified correctly, so no temperature fits best: T stays 1. "
            "Hold out more samples.",
            stacklevel=2,
        )
        return 1.0

    def nll(log_temperature: float) -> float:
        return F.cross_entropy(logits * math.exp(-log_temperature), labels).item()

    bounds = (-LOG_TEMPERATURE_BOUND, LOG_TEMPERATURE_BOUND)
    found = minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-6})
    if abs(found.x) > LOG_TEMPERATURE_BOUND - 1e-3:
        warnings.warn(
            f"The best temperature lies at the end of the search, {math.exp(found.x):.3g}: the logits tell next to "
            "nothing of the labels, or their scale is far off. Look at the logits and the order of the classes.",
            stacklevel=2,
        )
    before = nll(0.0)
    if not found.fun <= before + ROUNDING:
        _warn_of_refusal("temperature", before, found.fun)
    return math.exp(found.x) if found.fun < before else 1.0


def fit_temperature_scaling(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> Scaling:
    """Fit a temperature and return it as a `Scaling`, with the NLL before and after.

    Where `fit_temperature` keeps T at 1, this is the identity.

    Args:
        logits: Held-out logits, not probabilities, shape `(N, C)`, N >= 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.

    Raises:
        ValueError: As `fit_temperature`.

    >>> logits, labels = np.array([[4.0, 0.0]] * 4), np.array([0, 0, 0, 1])  # right 3 times in 4
    >>> round(fit_temperature_scaling(logits, labels).scale, 4)  # 1 / T = log 3 / 4
    0.2747
    """
    temperature = fit_temperature(logits, labels)
    return measured(Scaling(1 / temperature), *checked(logits, labels))


def fit_vector_scaling(logits: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> Scaling:
    """Fit one factor and one bias per class that minimise the NLL of `logits * scale + bias`.

    L-BFGS with the analytic gradient, from the best temperature on. The objective is convex: the summed NLL plus half
    the squared distance from the start, with factors counted in units of 1 / T and biases in nats. That is a normal
    prior of width 1; it holds back numbers which nothing else would (a class that is always right) and fades as
    samples grow. With fewer than about 30 samples per class the temperature alone is the safer choice for new samples.
    More can change than confidence: the most likely class of a sample too.

    Args:
        logits: Held-out logits, not probabilities, shape `(N, C)`, N >= 1.
        labels: Class indices in `[0, C)`, shape `(N,)`.

    Returns:
        A vector scaling. With a warning it is less: the temperature alone where a class has no sample (its bias would
        learn that the class does not exist), and the identity where every sample is classified correctly or the fit
        raised the NLL.

    Raises:
        ValueError: As `fit_temperature`.

    Source: Guo et al. 2017, arXiv 1706.04599, section 4.2, but for the penalty.

    >>> logits, labels = np.array([[4.0, 0.0], [0.0, 4.0]] * 200), np.array([0, 1, 0, 0] * 100)  # class 0: 3 in 4
    >>> found = fit_vector_scaling(logits, labels)
    >>> found.method, found.bias[0] > found.bias[1]
    ('vector', True)
    """
    logits, labels = checked(logits, labels)
    if not torch.isfinite(logits).all():
        raise ValueError("Vector scaling needs every class of every sample, found logits of -inf: fit a temperature.")
    start = fit_temperature_scaling(logits, labels)
    if _all_right(logits, labels):
        return start
    missing = sorted(set(range(logits.shape[1])) - set(labels.tolist()))
    if missing:
        warnings.warn(
            f"The {len(labels)} held-out samples hold none of class {missing}, so there is no bias to fit for it: "
            "one temperature scales all classes. Hold out samples of every class.",
            stacklevel=2,
        )
        return start

    found = _fit_vector(start.apply(logits).numpy(), labels.numpy())
    factors, bias = found.reshape(2, -1)
    before = measured(Scaling(1.0), logits, labels)
    if not np.isfinite(found).all() or not factors.all():
        _warn_of_refusal("vector scaling", _nll(logits, labels), math.nan)
        return before
    fitted = measured(Scaling(tuple(factors * start.scale), tuple(bias)), logits, labels)
    earlier, later = _nll(logits, labels), _nll(fitted.apply(logits), labels)
    if later > earlier + ROUNDING:
        _warn_of_refusal("vector scaling", earlier, later)
        return before
    return fitted


def _fit_vector(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Minimise the NLL over factors and biases; returns the factors, then the biases, shape `(2 C,)`."""
    size, num_classes = logits.shape
    target = np.eye(num_classes)[labels]
    start = np.repeat([1.0, 0.0], num_classes)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        factors, bias = parameters.reshape(2, num_classes)
        scaled = torch.from_numpy(logits * factors + bias)
        log_p = F.log_softmax(scaled, dim=-1).numpy()
        distance = parameters - start
        value = -(target * log_p).sum() + distance @ distance / 2
        slope = np.exp(log_p) - target  # of the summed NLL in the scaled logits
        gradient = np.concatenate([(slope * logits).sum(axis=0), slope.sum(axis=0)]) + distance
        return value / size, gradient / size

    options = {"maxiter": 1000, "ftol": 1e-14, "gtol": 1e-9}
    return minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x


def checked(logits: Any, labels: Any) -> tuple[Tensor, Tensor]:
    """Validate logits and labels and return them as float64 and int64 on the CPU."""
    logits, labels = torch.as_tensor(logits).detach().cpu().double(), torch.as_tensor(labels).cpu()
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"Expected logits (N, C) and labels (N,) with N >= 1, found {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if labels.is_floating_point() or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"labels must be integers in [0, {logits.shape[1]}), found {labels.min()} to {labels.max()} as "
            f"{labels.dtype}. Drop ignored samples first."
        )
    of_label = logits.gather(1, labels.long()[:, None])
    if not torch.isfinite(logits.where(logits != -torch.inf, 0)).all() or not torch.isfinite(of_label).all():
        raise ValueError(
            "Held-out logits must be finite, but for -inf of classes that a sample cannot have, found NaN, infinite "
            "ones or -inf at a label."
        )
    if bool((logits >= 0).all()) and bool(((logits.sum(-1) - 1).abs() < 1e-2).all()):
        raise ValueError(
            "Expected logits, found rows of probabilities (not negative, each with the sum 1). Give the scores before "
            "the softmax, or the logarithm of the probabilities."
        )
    return logits, labels.long()


def _all_right(logits: Tensor, labels: Tensor) -> bool:
    return bool((logits.argmax(dim=-1) == labels).all())


def measured(scaling: Scaling, logits: Tensor, labels: Tensor) -> Scaling:
    """Add the NLL before and after to a scaling."""
    return dataclasses.replace(
        scaling,
        nll_before=_nll(logits, labels),
        nll_after=_nll(scaling.apply(logits), labels),
        num_samples=len(labels),
    )


def _nll(logits: Tensor, labels: Tensor) -> float:
    return F.cross_entropy(logits, labels).item()


def _warn_of_refusal(name: str, before: float, after: float) -> None:
    warnings.warn(
        f"The fitted {name} moves the NLL of its own samples from {before:.6f} to {after:.6f}, so it is refused: the "
        "logits stay as they are. Look at the logits: are some of them enormous?",
        stacklevel=3,
    )
