"""Lightning over two processes: one norm and one verdict, whatever a rank holds."""

import pytest
import torch
from lightning_ranks import (
    OVERFLOW,
    RANKS,
    STEPS,
    fits_ddp,
    fits_fsdp1,
    fits_fsdp2,
    fits_fsdp2_in_half,
    resumes_fsdp2,
)
from lightning_runs import BATCH, LIMIT, QUIET, Net, loader, momentum, trainer, weights

from processes import together

pytestmark = QUIET


@pytest.fixture(scope="module")
def reference():
    """Train in one process on the batches of both ranks, clipped by Lightning."""
    model = Net(momentum)
    trainer(gradient_clip_val=LIMIT).fit(model, loader(STEPS, RANKS * BATCH))
    return model


@pytest.mark.parametrize("fits", [fits_ddp, fits_fsdp1, fits_fsdp2])
def test_two_ranks_end_where_one_process_clipped_by_lightning_does(reference, fits):
    """Lightning#21928, #19235, #13339: its own norm clipping is refused, or lost, under FSDP."""
    first, second = together(fits, RANKS)
    losses = [(one + two) / 2 for one, two in zip(first[0], second[0], strict=True)]
    assert losses == pytest.approx(reference.losses, rel=1e-6, abs=1e-6)
    for found in (first, second):
        torch.testing.assert_close(found[2], weights(reference), rtol=1e-6, atol=1e-6)
    assert [each.norm_pre for each in first[1]] == [each.norm_pre for each in second[1]]
    assert all(each.clipped and each.norm_post <= LIMIT for each in first[1])
    assert len(first[1]) == STEPS
    if fits is fits_fsdp1:
        assert first[3] == second[3]
        assert first[3] == (
            "MisconfigurationException: `gradient_clip_algorithm='norm'` is currently not "
            "supported for `FSDPPrecision`"
        )


def test_what_one_rank_finds_no_rank_steps_on_under_a_fused_optimizer_and_a_scaler():
    for results, unchanged, scale in together(fits_fsdp2_in_half, RANKS):
        steps = range(1, STEPS)
        assert unchanged == [n == OVERFLOW for n in steps]
        assert [each.skipped for each in results[1:]] == [n == OVERFLOW for n in steps]
        assert scale == 512.0


def test_a_sharded_run_is_resumed_with_its_history(tmp_path):
    """Such a strategy restores a checkpoint after fitting has started, not before."""
    found = together(resumes_fsdp2, RANKS, str(tmp_path))
    assert found == [(STEPS, 2 * STEPS)] * RANKS
