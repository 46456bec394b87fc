"""What every launch of a kernel asks of torch."""

from collections.abc import Iterator

import pytest
import torch

from attn_core.kernels.launch import product_options

MATMUL = torch.backends.cuda.matmul


@pytest.fixture(autouse=True)
def _settings_restored() -> Iterator[None]:
    newer = MATMUL.fp32_precision
    yield
    MATMUL.fp32_precision = newer


@pytest.mark.parametrize(("setting", "expected"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_the_newer_setting_of_tf32_is_followed(setting: str, expected: str) -> None:
    MATMUL.fp32_precision = setting
    assert product_options(torch.float32)["PRECISION"] == expected
    assert product_options(torch.bfloat16)["PRECISION"] == "ieee"


@pytest.mark.parametrize(("setting", "expected"), [("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")])
def test_the_older_setting_of_tf32_is_followed(setting: str, expected: str) -> None:
    torch.set_float32_matmul_precision(setting)
    try:
        assert product_options(torch.float32)["PRECISION"] == expected
    finally:
        torch.set_float32_matmul_precision("highest")
