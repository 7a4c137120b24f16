"""The programs that the Triton backend runs on a GPU, in Triton's language.

The first six are launched, and the others are what they are made of. A chunk is a piece of one row
of one tensor; ``table`` says of each its tensor, first element, length and row: int64 (C, 4).
"""

import triton
import triton.language as tl

MAXIMUM = tl.constexpr(0)
"""Stands for p = inf."""

_LOW = tl.constexpr(2.0**-80)
"""Float32 squares that vanished add up to less than 2^-26 of a chunk's sum above this."""

_LOW_64 = tl.constexpr(2.0**-940)
_DOWN = tl.constexpr(2.0**-600)
_UP = tl.constexpr(2.0**600)
_COARSE = tl.constexpr(2.0**-100)
"""Float32 would round a smaller coefficient, or what it is applied to, coarsely."""


@triton.jit
def power_sums(
    addresses,
    table,
    found,
    POWER: tl.constexpr,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    RECOUNT: tl.constexpr,
):
    """Sum powers of each chunk, float64 (C, A), or find its largest modulus, (C, 1)."""
    chunk = tl.program_id(0).to(tl.int64)
    address, count, _ = look_up(addresses, table, chunk, DTYPE)
    pointer = address.to(tl.pointer_type(DTYPE))
    if address % 16 == 0:
        sums, peaks = accumulate(aligned(address, DTYPE), count, POWER, KIND, BLOCK)
    else:
        sums, peaks = accumulate(pointer, count, POWER, KIND, BLOCK)
    # From here on one path, so that alignment does not show in the order of additions.
    if POWER == MAXIMUM:
        tl.store(found + chunk, largest(peaks, sums))
    elif KIND == tl.float64:
        total = tl.sum(sums)
        lost = total == float("inf")
        if total < _LOW_64:
            lost = tl.max(peaks) > 0
        if lost:
            down = recount(pointer, count, _DOWN, POWER, RECOUNT)
            up = recount(pointer, count, _UP, POWER, RECOUNT)
        else:
            down = total * _DOWN
            up = total * _UP
            if POWER == 2:
                down = down * _DOWN
                up = up * _UP
        tl.store(found + 3 * chunk, total)
        tl.store(found + 3 * chunk + 1, down)
        tl.store(found + 3 * chunk + 2, up)
    else:
        total = tl.sum(sums.to(tl.float64))
        lost = total == float("inf")
        if total < _LOW:
            lost = tl.max(peaks) > 0
        if lost:
            total = recount(pointer, count, 1.0, POWER, RECOUNT)
        tl.store(found + chunk, total)


@triton.jit(do_not_specialize=["scales", "power_bits"])
def scaled_power_sums(
    addresses,
    table,
    scales,
    power_bits: tl.int64,
    found,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum ``|x / scale|**p`` of each chunk in float64: (C, 1)."""
    chunk = tl.program_id(0).to(tl.int64)
    address, count, row = look_up(addresses, table, chunk, DTYPE)
    pointer = address.to(tl.pointer_type(DTYPE))
    power = as_float64(power_bits)
    scale = tl.load(scales + row)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        there = start + lanes < count
        values = tl.load(pointer + start + lanes, mask=there, other=0.0).to(tl.float64)
        sums += tl.exp2(power * tl.log2(tl.abs(values) / scale))
    tl.store(found + chunk, tl.sum(sums))


@triton.jit
def fold(
    found,
    firsts,
    folded,
    COLUMNS: tl.constexpr,
    LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Bring what was found in chunks together by rows: (R, A); one program for each number."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1)
    last = tl.load(firsts + row + 1)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    peaks = tl.zeros([BLOCK], tl.float64)
    for start in range(tl.load(firsts + row), last, BLOCK):
        chunks = start + lanes
        values = tl.load(found + chunks * COLUMNS + column, mask=chunks < last, other=0.0)
        peaks = tl.maximum(peaks, values)
        sums += values
    if LARGEST:
        tl.store(folded + row, largest(peaks, sums))
    else:
        tl.store(folded + row * COLUMNS + column, tl.sum(sums))


@triton.jit(
    do_not_specialize=[
        "norms", "thresholds", "targets", "threshold_bits", "target_bits", "committed", "room_bits",
        "skipped_bits", "found", "scopes",
    ]
)  # fmt: skip
def coefficients(
    norms,
    thresholds,
    targets,
    threshold_bits: tl.int64,
    target_bits: tl.int64,
    committed,
    room_bits: tl.int64,
    skipped_bits: tl.int64,
    found,
    scopes,
    NUMBERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn norms, (S,), into what their scopes are multiplied by."""
    scope = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    norm = tl.load(norms + scope, mask=scope < scopes, other=0.0)
    if NUMBERS:
        threshold = as_float64(threshold_bits)
        target = as_float64(target_bits)
    else:
        threshold = tl.load(thresholds + scope, mask=scope < scopes, other=0.0)
        target = tl.load(targets + scope, mask=scope < scopes, other=0.0)
    shrunk = target / norm * as_float64(room_bits)
    found_here = tl.where((norm > threshold) & (norm > target), shrunk, 1.0)
    if tl.load(committed) == 0:
        found_here = tl.full([BLOCK], 0.0, tl.float64) + as_float64(skipped_bits)
    tl.store(found + scope, found_here, mask=scope < scopes)


@triton.jit(do_not_specialize=["coefficients"])
def scale(
    addresses,
    table,
    coefficients,
    chunks,
    PER_ROW: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Multiply each chunk by the coefficient of its row, or by the one of all; leave at 1."""
    # Backwards: what was read last may still be in the cache.
    for step in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = (chunks - 1 - step).to(tl.int64)
        entry = table + 4 * chunk
        coefficient = tl.load(coefficients + (tl.load(entry + 3) if PER_ROW else 0))
        if coefficient != 1:
            address, count, _ = look_up(addresses, table, chunk, DTYPE)
            if address % 16 == 0:
                multiply(aligned(address, DTYPE), count, coefficient, BLOCK)
            else:
                multiply(address.to(tl.pointer_type(DTYPE)), count, coefficient, BLOCK)


@triton.jit(do_not_specialize=["limit"])
def clamp(
    addresses,
    table,
    limit,
    before,
    after,
    changed,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clamp each chunk, sum squares before and after, and count what changes; write it, or not."""
    chunk = tl.program_id(0).to(tl.int64)
    address, count, _ = look_up(addresses, table, chunk, DTYPE)
    pointer = address.to(tl.pointer_type(DTYPE))
    top = tl.load(limit).to(KIND)
    if address % 16 == 0:
        lanes = limit_to(aligned(address, DTYPE), count, top, KIND, WRITE, BLOCK)
    else:
        lanes = limit_to(pointer, count, top, KIND, WRITE, BLOCK)
    tl.store(changed + chunk, tl.sum(lanes[0].to(tl.int64)))
    if KIND == tl.float64:
        for column in tl.static_range(3):
            tl.store(before + 3 * chunk + column, tl.sum(lanes[1 + column]))
            tl.store(after + 3 * chunk + column, tl.sum(lanes[4 + column]))
    else:
        tl.store(before + chunk, tl.sum(lanes[1]))
        tl.store(after + chunk, tl.sum(lanes[4]))


# --- what these are made of -------------------------------------------------------------------


@triton.jit
def look_up(addresses, table, chunk, DTYPE: tl.constexpr):
    """Return where a chunk begins, how many elements it has, and which row it is of."""
    entry = table + 4 * chunk
    base = tl.load(addresses + tl.load(entry)).to(tl.pointer_type(DTYPE))
    address = (base + tl.load(entry + 1)).to(tl.int64)  # Triton 3.2 tells no item size
    return address, tl.load(entry + 2).to(tl.int32), tl.load(entry + 3)


@triton.jit
def aligned(address, DTYPE: tl.constexpr):
    """Return an address that is a multiple of 16 as a pointer which the compiler knows to be one.

    What ``multiple_of`` says holds of a value wherever it is used, so this is a value of its own.
    """
    return tl.multiple_of((address // 16 * 16).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def accumulate(pointer, count, POWER: tl.constexpr, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Sum a chunk lane by lane, and keep each lane's largest modulus."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], KIND)
    peaks = tl.zeros([BLOCK], KIND)
    whole = count // BLOCK
    for block in range(whole):
        values = tl.abs(tl.load(pointer + block * BLOCK + lanes).to(KIND))
        peaks = tl.maximum(peaks, values)
        sums += values * values if POWER == 2 else values
    rest = count - whole * BLOCK
    if rest > 0:
        there = lanes < rest
        values = tl.load(pointer + whole * BLOCK + lanes, mask=there, other=0.0)
        values = tl.abs(values.to(KIND))
        peaks = tl.maximum(peaks, values)
        sums += values * values if POWER == 2 else values
    return sums, peaks


@triton.jit
def recount(pointer, count, FACTOR: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """Sum a chunk in float64, after multiplication by a factor."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        there = start + lanes < count
        values = tl.load(pointer + start + lanes, mask=there, other=0.0).to(tl.float64)
        values = tl.abs(values) * FACTOR
        sums += values * values if POWER == 2 else values
    return tl.sum(sums)


@triton.jit
def largest(peaks, sums):
    """Return the maximum of some lanes, float64; NaN if a sum is, since a maximum loses it."""
    odd = tl.max((sums != sums).to(tl.int32))
    return tl.where(odd > 0, float("nan"), tl.max(peaks).to(tl.float64))


@triton.jit
def multiply(pointer, count, coefficient, BLOCK: tl.constexpr):
    """Multiply a chunk in place; 0 sets zeros, whatever was there."""
    lanes = tl.arange(0, BLOCK)
    whole = count // BLOCK
    for block in range(whole):
        places = pointer + block * BLOCK + lanes
        tl.store(places, product(tl.load(places), coefficient))
    rest = count - whole * BLOCK
    if rest > 0:
        there = lanes < rest
        places = pointer + whole * BLOCK + lanes
        values = tl.load(places, mask=there, other=0.0)
        tl.store(places, product(values, coefficient), mask=there)


@triton.jit
def product(values, coefficient):
    """Multiply in the precision of float32 at least, and round once."""
    if coefficient == 0:
        result = tl.zeros_like(values)
    elif values.dtype == tl.float64:
        result = values * coefficient
    elif coefficient < _COARSE:
        result = (values.to(tl.float64) * coefficient).to(tl.float32).to(values.dtype)
    else:
        result = (values.to(tl.float32) * coefficient.to(tl.float32)).to(values.dtype)
    return result


@triton.jit
def limit_to(pointer, count, top, KIND: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """Clamp a chunk; return what changes and the squares before and after, lane by lane."""
    lanes = tl.arange(0, BLOCK)
    moved = tl.zeros([BLOCK], tl.int32)
    before = tl.zeros([BLOCK], tl.float64)
    after = tl.zeros([BLOCK], tl.float64)
    before_down, before_up, after_down, after_up = before, before, before, before
    whole = count // BLOCK
    for block in range((count + BLOCK - 1) // BLOCK):
        places = pointer + block * BLOCK + lanes
        there = lanes < count - block * BLOCK
        if block < whole:
            values = tl.load(places)
        else:
            values = tl.load(places, mask=there, other=0.0)
        wide = values.to(KIND)
        over = (wide > top) | (wide < -top)
        limited = tl.where(wide > top, top, tl.where(wide < -top, -top, wide))
        if WRITE:
            if tl.max(over.to(tl.int32)) > 0:
                if block < whole:
                    tl.store(places, limited.to(values.dtype))
                else:
                    tl.store(places, limited.to(values.dtype), mask=there)
        moved += over.to(tl.int32)
        before += square(wide, 1.0)
        after += square(limited, 1.0)
        if KIND == tl.float64:
            before_down += square(wide, _DOWN)
            before_up += square(wide, _UP)
            after_down += square(limited, _DOWN)
            after_up += square(limited, _UP)
    return moved, before, before_down, before_up, after, after_down, after_up


@triton.jit
def square(values, FACTOR: tl.constexpr):
    """Return the squares of some multiples, float64."""
    scaled = values.to(tl.float64) * FACTOR
    return scaled * scaled


@triton.jit
def as_float64(bits):
    """Return the float64 that an integer has the bits of."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)
