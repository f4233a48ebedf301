"""row_kernel: one program a row, from the logits of both models to values, diagnostics and the
gradient in their place.

A row is read in two passes (sums, gradient), for the divergences of a mixture in three (sums,
mixture, gradient): what a row needs of its own sums must be known before its gradient can be
written. All sums are carried online, lane by lane, as in an online softmax (arXiv 1805.02867). The
last pass runs backwards: it begins with what the cache still holds, and a bf16 gradient may be
written into the second half of the fp32 row that it replaces (`kd.losses.heads.gradient_view`).

Names: s are finished logits of the student at T = 1, x = s / T, y the teacher's; q = softmax(x), p
= softmax(y); a lane is one of BLOCK columns. V and whatever decides the code are compile-time
constants. The number of rows is not, and changes freely.
"""

import triton
import triton.language as tl

# A masked lane: its exp() is zero, and the difference of two is finite.
NEVER = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    # All of these change with the rows of a chunk: none may compile the kernel anew.
    do_not_specialize_on_alignment=[
        "labels_ptr",
        "weights_ptr",
        "kd_ptr",
        "ce_ptr",
        "diagnostics_ptr",
    ],
)
def row_kernel(
    student_ptr,
    teacher_ptr,
    student_bias,
    teacher_bias,
    labels_ptr,
    weights_ptr,
    kd_ptr,
    ce_ptr,
    dlogits_ptr,
    diagnostics_ptr,
    student_stride,
    teacher_stride,
    dlogits_stride,
    temperature: tl.float64,
    parameter: tl.float64,
    kd_weight: tl.float64,
    ce_weight: tl.float64,
    student_cap: tl.float64,
    teacher_cap: tl.float64,
    student_scale: tl.float64,
    teacher_scale: tl.float64,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    IS_MIXTURE: tl.constexpr,
    TEMPERED: tl.constexpr,
    STUDENT_FINISH: tl.constexpr,
    TEACHER_FINISH: tl.constexpr,
):
    """Values, diagnostics and gradient of one row; what a pointer of None would receive is not
    computed.

    DIVERGENCE is "none" without a teacher. FINISH: 1 for a scale, 2 for a softcap, 3 for both.
    """
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = weights_ptr.dtype.element_ty
    DIAGNOSTICS: tl.constexpr = diagnostics_ptr is not None
    NUM_FULL: tl.constexpr = V // BLOCK
    lanes = tl.arange(0, BLOCK)
    T = tl.full((), temperature, dtype)
    parameter = tl.full((), parameter, dtype)
    student_row, teacher_row = student_ptr + row * student_stride, teacher_ptr
    if teacher_ptr is not None:
        teacher_row = teacher_ptr + row * teacher_stride
    student = (
        student_row,
        student_bias,
        tl.full((), student_cap, dtype),
        tl.full((), student_scale, dtype),
    )
    teacher = (
        teacher_row,
        teacher_bias,
        tl.full((), teacher_cap, dtype),
        tl.full((), teacher_scale, dtype),
    )
    label = tl.load(labels_ptr + row)

    sums = _no_sums(BLOCK, dtype)
    # Differences of logits are summed less that of the first token: an offset between models
    # costs no digits.
    shift = label.to(dtype) * 0.0
    if DIVERGENCE != "none":
        first = label * 0
        shift = _tempered(_finished(student, first, dtype, V, STUDENT_FINISH, False), T, TEMPERED)
        shift -= _tempered(_finished(teacher, first, dtype, V, TEACHER_FINISH, False), T, TEMPERED)
    for i in range(NUM_FULL):
        cols = i * BLOCK + lanes
        sums = _sum_tile(
            sums,
            student,
            teacher,
            cols,
            shift,
            T,
            V,
            DIVERGENCE,
            TEMPERED,
            DIAGNOSTICS,
            STUDENT_FINISH,
            TEACHER_FINISH,
            False,
        )
    if V % BLOCK:
        cols = NUM_FULL * BLOCK + lanes
        sums = _sum_tile(
            sums,
            student,
            teacher,
            cols,
            shift,
            T,
            V,
            DIVERGENCE,
            TEMPERED,
            DIAGNOSTICS,
            STUDENT_FINISH,
            TEACHER_FINISH,
            True,
        )
    lses, means, tops = _row_sums(sums, shift, DIVERGENCE, TEMPERED)
    lse_x, lse_y, lse_s = lses
    reverse_kl, mean_x, forward_kl, mean_y = means
    # Stored as soon as it is known: kept to the end, it costs registers that would then be spilled.
    tl.store(ce_ptr + row, lse_s - _finished(student, label, dtype, V, STUDENT_FINISH, False))

    if IS_MIXTURE:
        terms = (tl.zeros((BLOCK,), dtype), tl.zeros((BLOCK,), dtype))
        for i in range(NUM_FULL):
            cols = i * BLOCK + lanes
            terms = _mixture_tile(
                terms,
                student,
                teacher,
                cols,
                T,
                lses,
                parameter,
                V,
                DIVERGENCE,
                TEMPERED,
                STUDENT_FINISH,
                TEACHER_FINISH,
                False,
            )
        if V % BLOCK:
            cols = NUM_FULL * BLOCK + lanes
            terms = _mixture_tile(
                terms,
                student,
                teacher,
                cols,
                T,
                lses,
                parameter,
                V,
                DIVERGENCE,
                TEMPERED,
                STUDENT_FINISH,
                TEACHER_FINISH,
                True,
            )
        values, w_sums = terms
        value, w_sum = tl.sum(values, 0), tl.sum(w_sums, 0)
    else:
        value, w_sum = _from_sums(means, parameter, DIVERGENCE)

    weight = tl.load(weights_ptr + row)
    kd_scale = weight * tl.full((), kd_weight, dtype) * T
    ce_scale = weight * tl.full((), ce_weight, dtype)
    agrees = tl.zeros((BLOCK,), tl.int32)
    if dlogits_ptr is not None or DIAGNOSTICS:
        dlogits_row = dlogits_ptr
        if dlogits_ptr is not None:
            dlogits_row = dlogits_ptr + row * dlogits_stride
        scalars = (lse_x, lse_y, lse_s, w_sum, parameter, kd_scale, ce_scale, T)
        if V % BLOCK:
            cols = NUM_FULL * BLOCK + lanes
            agrees = _gradient_tile(
                agrees,
                dlogits_row,
                student,
                teacher,
                cols,
                label,
                tops,
                scalars,
                V,
                DIVERGENCE,
                TEMPERED,
                DIAGNOSTICS,
                STUDENT_FINISH,
                TEACHER_FINISH,
                True,
            )
        for i in range(NUM_FULL):
            cols = (NUM_FULL - 1 - i) * BLOCK + lanes
            agrees = _gradient_tile(
                agrees,
                dlogits_row,
                student,
                teacher,
                cols,
                label,
                tops,
                scalars,
                V,
                DIVERGENCE,
                TEMPERED,
                DIAGNOSTICS,
                STUDENT_FINISH,
                TEACHER_FINISH,
                False,
            )
    tl.store(kd_ptr + row, T * T * value)
    if DIAGNOSTICS:
        diagnostics_row = diagnostics_ptr + row * 5
        tl.store(diagnostics_row, forward_kl)
        tl.store(diagnostics_row + 1, reverse_kl)
        tl.store(diagnostics_row + 2, lse_x - mean_x)
        tl.store(diagnostics_row + 3, lse_y - mean_y)
        tl.store(diagnostics_row + 4, tl.max(agrees, 0).to(dtype))


@triton.jit
def _finished(
    model, cols, dtype: tl.constexpr, V: tl.constexpr, FINISH: tl.constexpr, MASKED: tl.constexpr
):
    """Logits s of some columns: softcap(scale * (products + bias)), NEVER beyond the vocabulary."""
    row_ptr, bias_ptr, softcap, scale = model
    s = (
        tl.load(row_ptr + cols, mask=cols < V, other=0.0).to(dtype)
        if MASKED
        else tl.load(row_ptr + cols).to(dtype)
    )
    if bias_ptr is not None:
        s += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(dtype)
    if FINISH % 2 == 1:
        s = s * scale
    if FINISH >= 2:
        # tanh(z) = 1 - 2 / (exp(2 z) + 1); where exp overflows that is 1
        s = softcap * (1.0 - 2.0 / (_exp(2.0 * s / softcap) + 1.0))
    if MASKED:
        s = tl.where(cols < V, s, NEVER)
    return s


@triton.jit
def _exp(x):
    """exp(x) in fewer instructions than tl.exp(), which scales to keep what is below 1.2e-38: here
    that is zero (ex2.approx.ftz).
    """
    return tl.exp2(x * LOG2_E)


@triton.jit
def _tempered(s, T, TEMPERED: tl.constexpr):
    x = s
    if TEMPERED:
        x = tl.maximum(s / T, NEVER)
    return x


@triton.jit
def _online(x, top):
    """One step of an online softmax: the new maximum, the factor of the sums so far, and the term
    of x; one exp.
    """
    e = _exp(-tl.abs(x - top))
    is_new = x > top
    return tl.where(is_new, x, top), tl.where(is_new, e, 1.0), tl.where(is_new, 1.0, e)


@triton.jit
def _no_sums(BLOCK: tl.constexpr, dtype: tl.constexpr):
    """(maximum, sum(exp)) of x, y and s, then of exp(x) * (x - y), exp(x) * x, exp(y) * (y - x),
    exp(y) * y.
    """
    top, zero = tl.full((BLOCK,), NEVER, dtype), tl.zeros((BLOCK,), dtype)
    return top, zero, top, zero, top, zero, zero, zero, zero, zero


@triton.jit
def _sum_tile(
    sums,
    student,
    teacher,
    cols,
    shift,
    T,
    V: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TEMPERED: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,
    STUDENT_FINISH: tl.constexpr,
    TEACHER_FINISH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The first pass over one tile; x_xy and y_yx are of differences less `shift`."""
    top_x, sum_x, top_y, sum_y, top_s, sum_s, x_xy, x_x, y_yx, y_y = sums
    s = _finished(student, cols, sum_x.dtype, V, STUDENT_FINISH, MASKED)
    x = _tempered(s, T, TEMPERED)
    top_x, keep_x, term_x = _online(x, top_x)
    sum_x = sum_x * keep_x + term_x
    if TEMPERED:
        top_s, keep_s, term_s = _online(s, top_s)
        sum_s = sum_s * keep_s + term_s
    if DIVERGENCE != "none":
        y = _tempered(_finished(teacher, cols, sum_x.dtype, V, TEACHER_FINISH, MASKED), T, TEMPERED)
        top_y, keep_y, term_y = _online(y, top_y)
        sum_y = sum_y * keep_y + term_y
        if DIAGNOSTICS or DIVERGENCE == "reverse_kl" or DIVERGENCE == "mixed_kl":
            x_xy = x_xy * keep_x + term_x * (x - y - shift)
        if DIAGNOSTICS or DIVERGENCE == "forward_kl" or DIVERGENCE == "mixed_kl":
            y_yx = y_yx * keep_y + term_y * (y - x + shift)
        if DIAGNOSTICS:
            x_x = x_x * keep_x + term_x * x
            y_y = y_y * keep_y + term_y * y
    return top_x, sum_x, top_y, sum_y, top_s, sum_s, x_xy, x_x, y_yx, y_y


@triton.jit
def _row_sums(sums, shift, DIVERGENCE: tl.constexpr, TEMPERED: tl.constexpr):
    """From lanes to the row: log(sum(exp)) of x, y, s; reverse KL, mean of x, forward KL, mean of
    y; both maxima.
    """
    top_x, sum_x, top_y, sum_y, top_s, sum_s, x_xy, x_x, y_yx, y_y = sums
    max_x, lse_x, share_x = _across_lanes(top_x, sum_x)
    max_y, lse_y, share_y = max_x, lse_x, share_x
    if DIVERGENCE != "none":
        max_y, lse_y, share_y = _across_lanes(top_y, sum_y)
    lse_s = lse_x
    if TEMPERED:
        _, lse_s, _ = _across_lanes(top_s, sum_s)
    offset = shift - (lse_x - lse_y)
    means = (
        tl.sum(x_xy * share_x, 0) + offset,
        tl.sum(x_x * share_x, 0),
        tl.sum(y_yx * share_y, 0) - offset,
        tl.sum(y_y * share_y, 0),
    )
    return (lse_x, lse_y, lse_s), means, (max_x, max_y)


@triton.jit
def _across_lanes(top, total):
    """The row's maximum, its log(sum(exp)), and what turns a lane's sum into its part of a mean."""
    row_top = tl.max(top, 0)
    rescale = _exp(top - row_top)
    row_total = tl.sum(total * rescale, 0)
    return row_top, row_top + tl.log(row_total), rescale / row_total


@triton.jit
def _from_sums(means, parameter, DIVERGENCE: tl.constexpr):
    """The divergence and sum(w), which the first pass gives; zeros without a teacher."""
    reverse, mean_x, forward, _ = means
    value = mean_x * 0.0
    w_sum = value
    if DIVERGENCE == "forward_kl":
        value = forward
        w_sum = value * 0.0 - 1.0
    elif DIVERGENCE == "reverse_kl":
        value = reverse
        w_sum = reverse
    elif DIVERGENCE == "mixed_kl":
        value = parameter * forward + (1.0 - parameter) * reverse
        w_sum = (1.0 - parameter) * reverse - parameter
    else:
        tl.static_assert(DIVERGENCE == "none", "the first pass does not know this divergence")
    return value, w_sum


@triton.jit
def _terms(log_p, log_q, q, parameter, DIVERGENCE: tl.constexpr):
    """The terms of a mixture's divergence, zero for others, and w, as `kd.losses.row_functions`
    derives them.
    """
    value = q * 0.0
    if DIVERGENCE == "forward_kl":
        w = -_exp(log_p)
    elif DIVERGENCE == "reverse_kl":
        w = q * (log_q - log_p)
    elif DIVERGENCE == "mixed_kl":
        w = (1.0 - parameter) * q * (log_q - log_p) - parameter * _exp(log_p)
    elif DIVERGENCE == "tvd":
        p = _exp(log_p)
        w = tl.where(q > p, 0.5, tl.where(q < p, -0.5, 0.0)) * q
        value = 0.5 * tl.abs(q - p)
    elif DIVERGENCE == "jsd":
        log_m = _log_mixture(log_p, log_q, parameter)
        w = (1.0 - parameter) * q * (log_q - log_m)
        value = parameter * _exp(log_p) * (log_p - log_m) + w
    elif DIVERGENCE == "skew_kl":
        log_m = _log_mixture(log_p, log_q, parameter)
        p = _exp(log_p)
        w = (parameter - 1.0) * p * _exp(log_q - log_m)
        value = p * (log_p - log_m)
    elif DIVERGENCE == "skew_reverse_kl":
        log_ratio = log_q - _log_mixture(log_q, log_p, parameter)
        w = q * (log_ratio - parameter * _exp(log_ratio))
        value = q * log_ratio
    else:
        tl.static_assert(False, "_terms does not know this divergence")
    return value, w


@triton.jit
def _log_mixture(log_a, log_b, weight):
    """log(weight * a + (1 - weight) * b)"""
    a, b = log_a + tl.log(weight), log_b + tl.log(1.0 - weight)
    return tl.maximum(a, b) + tl.log(1.0 + _exp(-tl.abs(a - b)))


@triton.jit
def _mixture_tile(
    terms,
    student,
    teacher,
    cols,
    T,
    lses,
    parameter,
    V: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TEMPERED: tl.constexpr,
    STUDENT_FINISH: tl.constexpr,
    TEACHER_FINISH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The second pass over one tile, for a mixture."""
    values, w_sums = terms
    lse_x, lse_y, _ = lses
    log_q = (
        _tempered(_finished(student, cols, values.dtype, V, STUDENT_FINISH, MASKED), T, TEMPERED)
        - lse_x
    )
    log_p = (
        _tempered(_finished(teacher, cols, values.dtype, V, TEACHER_FINISH, MASKED), T, TEMPERED)
        - lse_y
    )
    value, w = _terms(log_p, log_q, _exp(log_q), parameter, DIVERGENCE)
    return values + value, w_sums + w


@triton.jit
def _gradient_tile(
    agrees,
    dlogits_row,
    student,
    teacher,
    cols,
    label,
    tops,
    scalars,
    V: tl.constexpr,
    DIVERGENCE: tl.constexpr,
    TEMPERED: tl.constexpr,
    DIAGNOSTICS: tl.constexpr,
    STUDENT_FINISH: tl.constexpr,
    TEACHER_FINISH: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The last pass over one tile: write its gradient, and note a token that is the most likely of
    both models.
    """
    lse_x, lse_y, lse_s, w_sum, parameter, kd_scale, ce_scale, T = scalars
    s = _finished(student, cols, lse_x.dtype, V, STUDENT_FINISH, MASKED)
    x = _tempered(s, T, TEMPERED)
    if DIVERGENCE != "none":
        y = _tempered(_finished(teacher, cols, lse_x.dtype, V, TEACHER_FINISH, MASKED), T, TEMPERED)
        if DIAGNOSTICS:
            top_x, top_y = tops
            agrees = agrees | ((x == top_x) & (y == top_y)).to(tl.int32)
    if dlogits_row is not None:
        q = _exp(x - lse_x)
        q1 = q
        if TEMPERED:
            q1 = _exp(s - lse_s)
        dlogits = ce_scale * tl.where(cols == label, q1 - 1.0, q1)
        if DIVERGENCE != "none":
            _, w = _terms(y - lse_y, x - lse_x, q, parameter, DIVERGENCE)
            dlogits += kd_scale * (w - q * w_sum)
        if STUDENT_FINISH >= 2:
            _, _, cap, _ = student
            dlogits *= 1.0 - (s / cap) * (s / cap)
        if STUDENT_FINISH % 2 == 1:
            _, _, _, scale = student
            dlogits *= scale
        # All logits of this tile are read before any is overwritten, by whichever thread.
        tl.debug_barrier()
        if MASKED:
            tl.store(dlogits_row + cols, dlogits.to(dlogits_row.dtype.element_ty), mask=cols < V)
        else:
            tl.store(dlogits_row + cols, dlogits.to(dlogits_row.dtype.element_ty))
    return agrees
