"""The program that ends a measurement: from sums of chunks to norms, a verdict and coefficients.

One program for each row brings the sums of its chunks together. The program that is the last to do
so has all rows before it: it judges them, and writes what a clip came to into one report, so that
no small operation follows. ``fused.py`` says what a report holds.
"""

import triton
import triton.language as tl

from gradclip.clipping.kernels import fused as reports
from gradclip.clipping.kernels.triton_programs import MAXIMUM, as_float64, largest

_LARGEST = tl.constexpr(3.4028234663852886e38)
_LIMITS = tl.constexpr(reports.LIMITS)
_NORM = tl.constexpr(reports.NORM)
_COEFFICIENT = tl.constexpr(reports.COEFFICIENT)
_REMAINING = tl.constexpr(reports.REMAINING)
_NORM_PRE = tl.constexpr(reports.NORM_PRE)
_NORM_POST = tl.constexpr(reports.NORM_POST)
_SMALLEST = tl.constexpr(reports.SMALLEST)
_THRESHOLD = tl.constexpr(reports.THRESHOLD)
_CLIPPED = tl.constexpr(reports.CLIPPED)
_SKIPPED = tl.constexpr(reports.SKIPPED)
_BY_POLICY = tl.constexpr(reports.BY_POLICY)
_BOUNDED = tl.constexpr(reports.BOUNDED)
_NONFINITE = tl.constexpr(reports.NONFINITE)


@triton.jit(do_not_specialize=["grad_scale", "scale_bits", "rows", "patterns"])
def decide(
    found,
    left,
    moved,
    spans,
    starts,
    limits,
    grad_scale,
    scale_bits: tl.int64,
    counter,
    folded,
    folded_left,
    folded_moved,
    coefficients,
    report,
    rows,
    patterns,
    POWER: tl.constexpr,
    CLAMPS: tl.constexpr,
    SKIPS: tl.constexpr,
    SCALED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Fold each row; the last program judges all of them.

    ``found`` has the sums of chunks; where patterns clamp, ``left`` those of what is left, and
    ``moved`` how many elements change.
    ``spans`` has the chunks of each row, (R, 2); ``starts`` the rows of each pattern, (P + 1,);
    ``limits`` what bounds it, (P, LIMITS). ``counter`` is 0 before and after.
    """
    row = tl.program_id(0).to(tl.int64)
    tl.store(folded + row, fold_row(found, spans, row, POWER == MAXIMUM, BLOCK))
    if CLAMPS:
        tl.store(folded_left + row, fold_row(left, spans, row, False, BLOCK))
        tl.store(folded_moved + row, fold_row(moved, spans, row, False, BLOCK))
    # Every program has written its rows before the last one reads them.
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == rows - 1:
        tl.store(counter, 0)
        lanes = tl.arange(0, WIDTH)
        norms = tl.zeros([WIDTH], tl.float64)
        lefts = tl.zeros([WIDTH], tl.float64)
        moves = tl.zeros([WIDTH], tl.float64)
        odd = tl.zeros([WIDTH], tl.int64)
        for pattern in range(patterns):
            first = tl.load(starts + pattern)
            last = tl.load(starts + pattern + 1)
            total, nonfinite = whole(folded, first, last, POWER == MAXIMUM, BLOCK)
            norms = tl.where(lanes == pattern, root(total, POWER), norms)
            odd = tl.where(lanes == pattern, nonfinite, odd)
            if CLAMPS:
                total, _ = whole(folded_left, first, last, False, BLOCK)
                lefts = tl.where(lanes == pattern, root(total, POWER), lefts)
                total, _ = whole(folded_moved, first, last, False, BLOCK)
                moves = tl.where(lanes == pattern, total, moves)
        if SCALED == 1:
            norms = norms / as_float64(scale_bits)
        if SCALED >= 2:
            norms = norms / tl.load(grad_scale).to(tl.float64)
        judge(norms, lefts, moves, odd, limits, coefficients, report, patterns, POWER, SKIPS, WIDTH)


@triton.jit
def judge(
    norms,
    lefts,
    moves,
    odd,
    limits,
    coefficients,
    report,
    patterns,
    POWER: tl.constexpr,
    SKIPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Judge the norms of all patterns, and fill the report: one lane for each pattern."""
    lanes = tl.arange(0, WIDTH)
    there = lanes < patterns
    entry = limits + lanes * _LIMITS
    threshold = tl.load(entry, mask=there, other=float("inf"))
    target = tl.load(entry + 1, mask=there, other=float("inf"))
    skip_above = tl.load(entry + 2, mask=there, other=float("inf"))
    room = tl.load(entry + 3, mask=there, other=1.0)
    otherwise = tl.load(entry + 4, mask=there, other=1.0)
    writes = tl.load(entry + 5, mask=there, other=0.0) > 0
    clamps = tl.load(entry + 6, mask=there, other=0.0) > 0
    shown = tl.load(entry + 7, mask=there, other=float("inf"))

    bounded = tl.where(clamps, norms == norms, norms < float("inf"))
    sound = tl.min((bounded | (writes == 0)).to(tl.int32)) > 0
    unwanted = tl.max(((norms > skip_above) & writes).to(tl.int32)) > 0
    all_bounded = tl.min((bounded | (there == 0)).to(tl.int32)) > 0
    by_policy = sound & unwanted

    shrunk = target / norms * room
    coefficient = tl.where((norms > threshold) & (norms > target), shrunk, 1.0)
    coefficient = tl.where(sound, coefficient, otherwise)
    coefficient = tl.where(by_policy & writes, 0.0, coefficient)
    tl.store(coefficients + lanes, coefficient, mask=there)

    if SKIPS:
        withheld = writes & (by_policy | (sound == 0))
    else:
        withheld = writes & unwanted
    clamped = clamps & writes
    clipped = tl.where(clamped, moves > 0, coefficient < 1) & (withheld == 0)
    remaining = tl.where(clamped, lefts, norms * coefficient)
    remaining = tl.where(coefficient == 0, 0.0, remaining)

    # Behind the patterns: all of them together.
    total = together(norms, there, POWER)
    total_left = together(remaining, there, POWER)
    smallest = tl.min(tl.where(there, coefficient, float("inf")))
    first = tl.min(tl.where(there & (coefficient == smallest), lanes, WIDTH))
    its_threshold = tl.max(tl.where(lanes == first, shown, 0.0))
    any_withheld = tl.max(withheld.to(tl.int32)) > 0
    any_clipped = (tl.max(clipped.to(tl.int32)) > 0) & (any_withheld == 0)
    wide = patterns + 1
    fill(report, _NORM, wide, norms, total, there, lanes, patterns)
    fill(report, _COEFFICIENT, wide, coefficient, smallest, there, lanes, patterns)
    fill(report, _REMAINING, wide, remaining, total_left, there, lanes, patterns)
    fill_single(report, _NORM_PRE, wide, norms, total, there, lanes, patterns)
    fill_single(report, _NORM_POST, wide, remaining, total_left, there, lanes, patterns)
    fill_single(report, _SMALLEST, wide, coefficient, smallest, there, lanes, patterns)
    fill_single(report, _THRESHOLD, wide, shown, its_threshold, there, lanes, patterns)
    numbers = report.to(tl.pointer_type(tl.int64), bitcast=True)
    fill(numbers, _CLIPPED, wide, clipped, any_clipped, there, lanes, patterns)
    fill(numbers, _SKIPPED, wide, withheld, any_withheld, there, lanes, patterns)
    fill(numbers, _BY_POLICY, wide, by_policy & there, by_policy, there, lanes, patterns)
    fill(numbers, _BOUNDED, wide, bounded, all_bounded, there, lanes, patterns)
    fill(numbers, _NONFINITE, wide, odd, tl.sum(odd), there, lanes, patterns)


@triton.jit
def fold_row(found, spans, row, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Bring what was found in the chunks of a row together: a sum, or the largest."""
    total, _ = whole(found, tl.load(spans + 2 * row), tl.load(spans + 2 * row + 1), LARGEST, BLOCK)
    return total


@triton.jit
def whole(found, first, last, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum or the largest of a stretch of numbers, and how many are not finite."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    peaks = tl.zeros([BLOCK], tl.float64)
    odd = tl.zeros([BLOCK], tl.int64)
    for start in range(first, last, BLOCK):
        places = start + lanes
        # Volatile: other programs of this launch may have written them.
        values = tl.load(found + places, mask=places < last, other=0.0, volatile=True)
        values = values.to(tl.float64)
        peaks = tl.maximum(peaks, values)
        sums += values
        odd += ((values == values) & (tl.abs(values) < float("inf")) == 0).to(tl.int64)
    if LARGEST:
        total = largest(peaks, sums)
    else:
        total = tl.sum(sums)
    return total, tl.sum(odd)


@triton.jit
def root(total, POWER: tl.constexpr):
    """Return a norm from a sum of powers, or from the largest modulus."""
    if POWER == 2:
        total = tl.sqrt(total)
    return total


@triton.jit
def together(norms, there, POWER: tl.constexpr):
    """Return the norm of all patterns from that of each; float32 norms have squares in float64."""
    norms = tl.where(there, norms, 0.0)
    if POWER == 2:
        total = tl.sqrt(tl.sum(norms * norms))
    elif POWER == MAXIMUM:
        total = largest(norms, norms)
    else:
        total = tl.sum(norms)
    return total


@triton.jit
def fill(report, COLUMN: tl.constexpr, wide, values, total, there, lanes, patterns):
    """Write a column of the report: a number for each pattern, and one for all."""
    column = report + COLUMN * wide
    tl.store(column + lanes, values.to(report.dtype.element_ty), mask=there)
    tl.store(column + patterns, total.to(report.dtype.element_ty))


@triton.jit
def fill_single(report, COLUMN: tl.constexpr, wide, values, total, there, lanes, patterns):
    """Write a column in float32, each number in the place of a float64; finite stays finite."""
    column = report.to(tl.pointer_type(tl.float32), bitcast=True) + 2 * COLUMN * wide
    tl.store(column + 2 * lanes, single(values), mask=there)
    tl.store(column + 2 * patterns, single(total))


@triton.jit
def single(value):
    """Round to float32; what is finite stays finite."""
    beyond = (value > _LARGEST) & (value < float("inf"))
    return tl.where(beyond, _LARGEST, value).to(tl.float32)
