"""The programs that the Triton backend runs on a GPU, in Triton's language.

The first six are launched, and the others are what they are made of. A chunk is a piece of one row
of one tensor; ``table`` says of each its tensor, first element, length and row: int64 (C, 4).
"""

import triton
import triton.language as tl

MAXIMUM = tl.constexpr(0)
"""Stands for p = inf."""

ANY = tl.constexpr(-1)
"""Stands for a power that is known when the program runs."""

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
    sums, peaks = accumulate(address, count, 1.0, 1.0, POWER, DTYPE, KIND, BLOCK)
    if POWER == MAXIMUM:
        tl.store(found + chunk, largest(peaks, sums))
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
        total, down, up = add_up(sums, peaks, pointer, count, float("inf"), POWER, KIND, RECOUNT)
        put(found, chunk, total, down, up, KIND)


@triton.jit(do_not_specialize=["scales", "power_bits"])
def scaled_power_sums(
    addresses,
    table,
    scales,
    power_bits: tl.int64,
    found,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
    RECOUNT: tl.constexpr,
):
    """Sum ``|x / scale|**p`` of each chunk: float64 (C, 1)."""
    chunk = tl.program_id(0).to(tl.int64)
    address, count, row = look_up(addresses, table, chunk, DTYPE)
    power = as_float64(power_bits)
    scale = tl.load(scales + row)
    sums, peaks = accumulate(
        address, count, scale.to(KIND), power.to(KIND), ANY, DTYPE, KIND, BLOCK
    )
    total = tl.sum(sums.to(tl.float64))
    if KIND != tl.float64:
        if (total == float("inf")) | (total < _LOW) | (scale < _COARSE):
            if tl.max(peaks) > 0:
                pointer = address.to(tl.pointer_type(DTYPE))
                again, _ = summed(pointer, count, scale, power, ANY, tl.float64, 1, RECOUNT)
                total = tl.sum(again)
    tl.store(found + chunk, total)


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
    if not PER_ROW:
        coefficient = tl.load(coefficients)
        if coefficient == 1:
            return
    # Backwards: what was read last may still be in the cache.
    for step in range(tl.program_id(0), chunks, tl.num_programs(0)):
        chunk = (chunks - 1 - step).to(tl.int64)
        if PER_ROW:
            coefficient = tl.load(coefficients + tl.load(table + 4 * chunk + 3))
        if coefficient != 1:
            address, count, _ = look_up(addresses, table, chunk, DTYPE)
            multiply(address, count, coefficient, DTYPE, BLOCK)


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
    RECOUNT: tl.constexpr,
):
    """Clamp each chunk, sum squares before and after, and count what changes; write it, or not.

    A chunk is read again, and written, only where its largest modulus exceeds the limit.
    """
    chunk = tl.program_id(0).to(tl.int64)
    address, count, _ = look_up(addresses, table, chunk, DTYPE)
    pointer = address.to(tl.pointer_type(DTYPE))
    top = tl.load(limit).to(KIND)
    sums, peaks = accumulate(address, count, 1.0, 1.0, 2, DTYPE, KIND, BLOCK)
    total, down, up = add_up(sums, peaks, pointer, count, float("inf"), 2, KIND, RECOUNT)
    put(before, chunk, total, down, up, KIND)
    moved = 0
    if tl.max((peaks > top).to(tl.int32)) > 0:
        sums, over = limit_to(address, count, top, DTYPE, KIND, WRITE, BLOCK)
        peaks = tl.minimum(peaks, top)
        total, down, up = add_up(sums, peaks, pointer, count, top, 2, KIND, RECOUNT)
        moved = tl.sum(over)
    put(after, chunk, total, down, up, KIND)
    tl.store(changed + chunk, moved)


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
def accumulate(
    address,
    count,
    scale,
    power,
    POWER: tl.constexpr,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum a chunk lane by lane, and keep each lane's largest modulus.

    Both ways add in one order, so that alignment does not show in a sum.
    """
    if address % 16 == 0:
        # So many blocks are eight loads of each thread.
        ROW: tl.constexpr = 1 if DTYPE == tl.float64 else 2 if DTYPE == tl.float32 else 4
        pointer = aligned(address, DTYPE)
        sums, peaks = summed(pointer, count, scale, power, POWER, KIND, ROW, BLOCK)
    else:
        pointer = address.to(tl.pointer_type(DTYPE))
        sums, peaks = summed(pointer, count, scale, power, POWER, KIND, 1, BLOCK)
    return sums, peaks


@triton.jit
def summed(
    pointer,
    count,
    scale,
    power,
    POWER: tl.constexpr,
    KIND: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Accumulate a chunk, of which the first ``ROW`` blocks are asked for at once."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], KIND)
    peaks = tl.zeros([BLOCK], KIND)
    whole = count // BLOCK
    done = 0
    if ROW > 1:
        done = tl.minimum(whole // ROW, 1) * ROW
        if done > 0:
            for block in tl.static_range(ROW):
                values = tl.abs(tl.load(pointer + block * BLOCK + lanes).to(KIND))
                peaks = tl.maximum(peaks, values)
                sums += term(values, scale, power, POWER)
    for block in range(done, whole):
        values = tl.abs(tl.load(pointer + block * BLOCK + lanes).to(KIND))
        peaks = tl.maximum(peaks, values)
        sums += term(values, scale, power, POWER)
    rest = count - whole * BLOCK
    if rest > 0:
        there = lanes < rest
        values = tl.load(pointer + whole * BLOCK + lanes, mask=there, other=0.0)
        values = tl.abs(values.to(KIND))
        peaks = tl.maximum(peaks, values)
        sums += term(values, scale, power, POWER)
    return sums, peaks


@triton.jit
def term(values, scale, power, POWER: tl.constexpr):
    """Return what moduli add to a sum."""
    if POWER == 2:
        result = values * values
    elif POWER == ANY:
        result = tl.exp2(power * tl.log2(values / scale))
    else:
        result = values
    return result


@triton.jit
def add_up(
    sums,
    peaks,
    pointer,
    count,
    top,
    POWER: tl.constexpr,
    KIND: tl.constexpr,
    RECOUNT: tl.constexpr,
):
    """Add up a chunk, of which no element counts more than ``top``: x, x * 2^-600 and x * 2^600.

    Where the sum says that its kind may have lost something, the chunk is read again, and counted
    in float64. Only float64 needs the multiples: else they are the same.
    """
    total = tl.sum(sums.to(tl.float64))
    lost = total == float("inf")
    if total < (_LOW_64 if KIND == tl.float64 else _LOW):
        lost = tl.max(peaks) > 0
    if KIND == tl.float64:
        if lost:
            down = recount(pointer, count, top, _DOWN, POWER, RECOUNT)
            up = recount(pointer, count, top, _UP, POWER, RECOUNT)
        else:
            down = total * _DOWN
            up = total * _UP
            if POWER == 2:
                down = down * _DOWN
                up = up * _UP
    else:
        if lost:
            total = recount(pointer, count, top, 1.0, POWER, RECOUNT)
        down, up = total, total
    return total, down, up


@triton.jit
def put(found, chunk, total, down, up, KIND: tl.constexpr):
    """Store what was found of a chunk: float64 has three numbers."""
    if KIND == tl.float64:
        tl.store(found + 3 * chunk, total)
        tl.store(found + 3 * chunk + 1, down)
        tl.store(found + 3 * chunk + 2, up)
    else:
        tl.store(found + chunk, total)


@triton.jit
def recount(pointer, count, top, FACTOR: tl.constexpr, POWER: tl.constexpr, BLOCK: tl.constexpr):
    """Sum a chunk in float64, after multiplication by a factor; no element is NaN."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        there = start + lanes < count
        values = tl.load(pointer + start + lanes, mask=there, other=0.0).to(tl.float64)
        values = tl.minimum(tl.abs(values), top) * FACTOR
        sums += values * values if POWER == 2 else values
    return tl.sum(sums)


@triton.jit
def largest(peaks, sums):
    """Return the maximum of some lanes, float64; NaN if a sum is, since a maximum loses it."""
    odd = tl.max((sums != sums).to(tl.int32))
    return tl.where(odd > 0, float("nan"), tl.max(peaks).to(tl.float64))


@triton.jit
def multiply(address, count, coefficient, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply a chunk in place; 0 sets zeros, whatever was there."""
    pointer = address.to(tl.pointer_type(DTYPE))
    if (coefficient > 0) & (coefficient < _COARSE):
        multiply_finely(pointer, count, coefficient, BLOCK // 4)
    elif address % 16 == 0:
        # So many blocks are eight loads of each thread.
        ROW: tl.constexpr = 1 if DTYPE == tl.float64 else 2 if DTYPE == tl.float32 else 4
        multiply_plainly(aligned(address, DTYPE), count, coefficient, ROW, BLOCK)
    else:
        multiply_plainly(pointer, count, coefficient, 1, BLOCK)


@triton.jit
def multiply_finely(pointer, count, coefficient, BLOCK: tl.constexpr):
    """Multiply in float64, where float32 would round coarsely."""
    lanes = tl.arange(0, BLOCK)
    for start in range(0, count, BLOCK):
        there = start + lanes < count
        values = tl.load(pointer + start + lanes, mask=there, other=0.0)
        result = values.to(tl.float64) * coefficient
        if values.dtype != tl.float64:
            result = result.to(tl.float32)
        tl.store(pointer + start + lanes, result.to(values.dtype), mask=there)


@triton.jit
def multiply_plainly(pointer, count, coefficient, ROW: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply, and read ``ROW`` blocks before one of them is written."""
    done = 0
    if ROW > 1:
        all_lanes = tl.arange(0, ROW * BLOCK)
        done = count // (ROW * BLOCK) * (ROW * BLOCK)
        for start in range(0, done, ROW * BLOCK):
            places = pointer + start + all_lanes
            tl.store(places, product(tl.load(places), coefficient))
    lanes = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for start in range(done, whole, BLOCK):
        tl.store(pointer + start + lanes, product(tl.load(pointer + start + lanes), coefficient))
    rest = count - whole
    if rest > 0:
        there = lanes < rest
        places = pointer + whole + lanes
        values = tl.load(places, mask=there, other=0.0)
        tl.store(places, product(values, coefficient), mask=there)


@triton.jit
def product(values, coefficient):
    """Multiply in the precision of float32 at least, and round once; 0 sets zeros."""
    if values.dtype == tl.float64:
        result = values * coefficient
    else:
        result = (values.to(tl.float32) * coefficient.to(tl.float32)).to(values.dtype)
    return tl.where(coefficient == 0, tl.zeros_like(result), result)


@triton.jit
def limit_to(
    address,
    count,
    top,
    DTYPE: tl.constexpr,
    KIND: tl.constexpr,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Clamp a chunk; return its squares after that, and how many change, lane by lane."""
    if address % 16 == 0:
        sums, moved = limited(aligned(address, DTYPE), count, top, KIND, WRITE, BLOCK)
    else:
        sums, moved = limited(address.to(tl.pointer_type(DTYPE)), count, top, KIND, WRITE, BLOCK)
    return sums, moved


@triton.jit
def limited(pointer, count, top, KIND: tl.constexpr, WRITE: tl.constexpr, BLOCK: tl.constexpr):
    """Clamp a chunk block by block."""
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], KIND)
    over = tl.zeros([BLOCK], tl.int32)
    whole = count // BLOCK
    for block in range(whole):
        places = pointer + block * BLOCK + lanes
        values = tl.load(places)
        wide = values.to(KIND)
        inside = tl.where(wide > top, top, tl.where(wide < -top, -top, wide))
        if WRITE:
            tl.store(places, inside.to(values.dtype))
        over += (tl.abs(wide) > top).to(tl.int32)
        sums += inside * inside
    rest = count - whole * BLOCK
    if rest > 0:
        there = lanes < rest
        places = pointer + whole * BLOCK + lanes
        values = tl.load(places, mask=there, other=0.0)
        wide = values.to(KIND)
        inside = tl.where(wide > top, top, tl.where(wide < -top, -top, wide))
        if WRITE:
            tl.store(places, inside.to(values.dtype), mask=there)
        over += (tl.abs(wide) > top).to(tl.int32)
        sums += inside * inside
    return sums, over


@triton.jit
def as_float64(bits):
    """Return the float64 that an integer has the bits of."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)
