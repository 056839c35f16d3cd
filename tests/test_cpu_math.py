"""exp, sigmoid and tanh of the CPU kernels against NumPy, to the ulp, for every instruction set.

An error is counted in ulps of the exact result (numpy float64 for float32, longdouble for float64).
The bounds below have little room above what dense sweeps and random bit patterns show, which is the
same to a twentieth of an ulp on every instruction set: exp 1.02, sigmoid 2.21, tanh 2.49.

Where relative accuracy ends. exp is accurate down to its smallest denormal. The sigmoid is
``1 / (1 + exp(-x))``, so it returns 0 where exp(-x) overflows: below -88.72 in float32 and -709.78
in float64, where the exact value is denormal or less. tanh is accurate everywhere.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from recurrence_cases import ISAS, run_under_isa

_C = pytest.importorskip("rnnlm_kernels._C")

pytestmark = pytest.mark.sanitize

FUNCTIONS = ("exp", "sigmoid", "tanh")
DTYPES = {"float32": (0, np.float32, np.float64), "float64": (1, np.float64, np.longdouble)}
BOUNDS = {"exp": 1.25, "sigmoid": 2.5, "tanh": 2.75}  # largest errors in ulps
# From here down a sigmoid may be 0: the logarithm of the largest number.
SIGMOID_ENDS = {"float32": -88.72, "float64": -709.78}

every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def evaluate(function: str, dtype: str, values) -> np.ndarray:
    code, storage, _ = DTYPES[dtype]
    x = np.ascontiguousarray(values, dtype=storage)
    y = np.full_like(x, np.nan)
    _C.cpu_elementwise(function, code, x.size, x.ctypes.data, y.ctypes.data)
    return y


def exact(function: str, dtype: str, x: np.ndarray) -> np.ndarray:
    x = x.astype(DTYPES[dtype][2])
    with np.errstate(over="ignore", under="ignore"):
        if function == "exp":
            return np.exp(x)
        if function == "tanh":
            return np.tanh(x)
        return 1 / (1 + np.exp(-x))


def ulps(function: str, dtype: str, x: np.ndarray) -> np.ndarray:
    """Error of every result, in units of the last place of the exact one."""
    storage = DTYPES[dtype][1]
    y, oracle = evaluate(function, dtype, x), exact(function, dtype, x)
    with np.errstate(over="ignore"):
        rounded = np.abs(oracle.astype(storage))
    overflows = np.isinf(rounded)
    assert np.all(y[overflows] == np.inf)
    spacing = np.spacing(np.where(overflows, 1, rounded))
    with np.errstate(invalid="ignore"):
        error = np.abs(y.astype(oracle.dtype) - oracle) / spacing
    return np.where(overflows, 0, error)


def arguments(function: str, dtype: str, seed: int = 0) -> np.ndarray:
    """Dense where the function bends, random bit patterns everywhere else; all finite."""
    storage = DTYPES[dtype][1]
    generator = np.random.default_rng(seed)
    bits = np.uint32 if dtype == "float32" else np.uint64
    patterns = generator.integers(0, np.iinfo(bits).max, 200_000, dtype=bits).view(storage)
    tiny = np.finfo(storage).tiny
    x = np.concatenate(
        [
            np.linspace(-1, 1, 100_001),
            np.linspace(-25, 25, 100_001),
            np.linspace(*((-110, 95) if dtype == "float32" else (-760, 720)), 200_001),
            generator.normal(0, 3, 100_000),
            np.concatenate([generator.uniform(-tiny, tiny, 10_000), [tiny, -tiny]]),
        ]
    ).astype(storage)
    x = np.concatenate([x, patterns[np.isfinite(patterns)]])
    return x[x > SIGMOID_ENDS[dtype]] if function == "sigmoid" else x


def check_error(function: str, dtype: str) -> None:
    x = arguments(function, dtype)
    error = ulps(function, dtype, x)
    worst = int(np.argmax(np.where(np.isnan(error), np.inf, error)))
    assert error[worst] <= BOUNDS[function], f"{function}({x[worst]!r}): {error[worst]} ulp"


def check_special_values(function: str, dtype: str) -> None:
    """Exact at zero and at both infinities, whatever the sign of zero; NaN stays NaN."""
    x = [0.0, -0.0, math.inf, -math.inf, math.nan, -math.nan]
    expected = {
        "exp": [1, 1, math.inf, 0],
        "sigmoid": [0.5, 0.5, 1, 0],
        "tanh": [0.0, -0.0, 1, -1],
    }[function]
    # Every lane position, with neighbours that need other treatment.
    for shift in range(37):
        y = evaluate(function, dtype, np.roll(np.array((x * 7)[:37]), shift))
        y = np.roll(y, -shift)
        for index, value in enumerate((expected + [math.nan] * 2) * 6):
            if math.isnan(value):
                assert math.isnan(y[index])
            else:
                assert y[index] == value
                assert math.copysign(1, y[index]) == math.copysign(1, value)


@every_dtype
@every_function
def test_error_in_ulps(function: str, dtype: str) -> None:
    check_error(function, dtype)


@every_dtype
@every_function
def test_zero_infinity_and_nan(function: str, dtype: str) -> None:
    check_special_values(function, dtype)


@every_dtype
@every_function
def test_every_nan_stays_nan(function: str, dtype: str) -> None:
    bits = {
        "float32": np.array([0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0xFFFFFFFF], np.uint32),
        "float64": np.array([0x7FF0000000000001, 0x7FF8000000000000, 2**64 - 1], np.uint64),
    }[dtype]
    assert np.isnan(evaluate(function, dtype, bits.view(DTYPES[dtype][1]))).all()


@every_dtype
def test_denormals_keep_their_value_in_tanh_and_become_one_in_exp(dtype: str) -> None:
    info = np.finfo(DTYPES[dtype][1])
    x = np.array([info.smallest_subnormal, info.tiny / 3, info.tiny], DTYPES[dtype][1])
    x = np.concatenate([x, -x])
    assert np.array_equal(evaluate("tanh", dtype, x), x)
    assert np.array_equal(evaluate("exp", dtype, x), np.ones_like(x))
    assert np.array_equal(evaluate("sigmoid", dtype, x), np.full_like(x, 0.5))


@every_dtype
def test_exp_reaches_its_smallest_denormal_and_overflows_where_it_should(dtype: str) -> None:
    storage = DTYPES[dtype][1]
    info = np.finfo(storage)
    largest = np.log(DTYPES[dtype][2](info.max))
    x = np.array([np.nextafter(storage(largest), storage(0)), info.max, largest * 1.001], storage)
    assert np.isinf(evaluate("exp", dtype, x)).tolist() == [False, True, True]
    smallest = storage(np.log(DTYPES[dtype][2](info.smallest_subnormal)) * 0.9999)
    assert evaluate("exp", dtype, [smallest])[0] == info.smallest_subnormal
    assert evaluate("exp", dtype, [smallest * storage(1.01)])[0] == 0


@every_dtype
def test_sigmoid_is_accurate_to_where_it_becomes_zero(dtype: str) -> None:
    end = SIGMOID_ENDS[dtype]
    assert evaluate("sigmoid", dtype, [end])[0] > 0
    assert not evaluate("sigmoid", dtype, np.linspace(end - 0.02, 4 * end, 1000)).any()


@every_dtype
def test_sigmoid_and_tanh_stay_in_range_and_end_at_one(dtype: str) -> None:
    x = np.linspace(-60, 60, 300_001)
    sigmoid, tanh = evaluate("sigmoid", dtype, x), evaluate("tanh", dtype, x)
    assert sigmoid.min() >= 0
    assert sigmoid.max() == 1
    assert np.abs(tanh).max() == 1
    saturated = 25 if dtype == "float32" else 45
    assert (sigmoid[x > saturated] == 1).all()
    assert (tanh[x > saturated / 2] == 1).all()
    # Monotone up to the rounding of one result against the next.
    eps = np.finfo(DTYPES[dtype][1]).eps
    for y in (sigmoid, tanh):
        assert (np.diff(y) >= -3 * eps * np.abs(y[1:])).all()


@every_dtype
def test_tanh_is_odd_to_the_bit(dtype: str) -> None:
    x = arguments("tanh", dtype)
    assert np.array_equal(evaluate("tanh", dtype, -x), -evaluate("tanh", dtype, x))


@every_function
def test_a_value_does_not_depend_on_its_lane_or_its_neighbours(function: str) -> None:
    x = np.random.default_rng(0).normal(0, 5, 67)
    for dtype in DTYPES:
        alone = np.concatenate([evaluate(function, dtype, [value]) for value in x])
        assert np.array_equal(evaluate(function, dtype, x), alone)


def test_nothing_is_written_behind_the_last_value() -> None:
    x, y = np.ones(40, np.float32), np.zeros(40, np.float32)
    for n in range(20):
        y[:] = -1
        _C.cpu_elementwise("exp", 0, n, x.ctypes.data, y.ctypes.data)
        assert (y[n:] == -1).all()
        assert (y[:n] > 2.7).all()


def test_unknown_functions_and_dtypes_are_refused() -> None:
    x = np.zeros(1, np.float32)
    for function, dtype in (("sin", 0), ("exp", 2)):
        with pytest.raises(ValueError, match="exp, sigmoid and tanh"):
            _C.cpu_elementwise(function, dtype, 1, x.ctypes.data, x.ctypes.data)


def check_everything() -> None:
    for function in FUNCTIONS:
        for dtype in DTYPES:
            check_error(function, dtype)
            check_special_values(function, dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_has_the_same_accuracy(isa: str) -> None:
    run_under_isa(isa, "import test_cpu_math; test_cpu_math.check_everything()")
