"""The compiled side of `solo.data.engines.kernel_numba`: one image at a time from its random numbers to its pixels.

All compiled functions live in this file: numba's cache on disk notices a change of the file it was made from and of no
other. `JIT` is the first digits of the SHA-256 of `solo.data.engines.jit`, which is compiled into them: so this file changes
with that one. What `solo.data.views` decides (ranges, chances, thresholds) comes in as data: ``view`` is a record of
`solo.data.engines.kernel_numba.VIEW`, ``row`` one of its `ROW`.

Two things make the loops vectorise. Numbers are float32 throughout, literals too. Offsets are unsigned: a signed index
might be negative and count from the end.
"""

import math
from typing import Any

import numpy as np

from solo.data.engines.jit import WIDTH, clamp, exact, fast, fetch, inlined, kept, load, plus, store, zeros
from solo.data.engines.kernel_torch import LUMA

JIT = "81db8b04"
Array = np.ndarray
U = np.uint64
f32 = np.float32
GOLDEN = U(0x9E3779B97F4A7C15)
ZERO, ONE, TWO, THREE, FOUR, SIX = (f32(number) for number in (0, 1, 2, 3, 4, 6))
CACHE_LINE, LANES = U(16), U(WIDTH)  # numbers
R, G, B = (f32(weight) for weight in LUMA)


# --- the numbers: `solo.data.random` and `solo.data.views.sample` for one image ------------------------------------------


@exact
def _mix(word: U) -> U:
    z = word + GOLDEN
    z = (z ^ (z >> U(30))) * U(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> U(27))) * U(0x94D049BB133111EB)
    return z ^ (z >> U(31))


@exact
def _number(stream: U, count: int) -> float:
    """The count-th number of a sample's stream, uniform on [0, 1)."""
    return np.float64(_mix(stream + U(count) * GOLDEN) >> U(11)) * 2.0**-53


@exact
def _within(bounds: Array, number: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * number


@exact
def _draw(stream: U, view: Any, row: Any, u: Array) -> None:
    drawn, height, width = 0, view.height, view.width
    row.box[:] = view.box
    if view.random_crop:
        drawn = 4 * view.tries
        for first in range(1, drawn, 4):
            for i in range(4):
                u[i] = _number(stream, first + i)
            area, ratio = height * width * _within(view.scale, u[0]), math.exp(_within(view.log_ratio, u[1]))
            w, h = int(np.rint(math.sqrt(area * ratio))), int(np.rint(math.sqrt(area / ratio)))
            if 0 < w <= width and 0 < h <= height:
                row.box[0], row.box[1] = int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1))
                row.box[2], row.box[3] = h, w
                break
    for i in range(len(u)):
        u[i] = _number(stream, drawn + 1 + i)
    row.jitter = u[0] < view.jitter
    for part in range(4):
        row.factors[part] = _within(view.factors[part], u[1 + part])
        place = 0  # its rank among the four numbers that follow
        for other in range(4):
            place += u[5 + other] < u[5 + part] or (u[5 + other] == u[5 + part] and other < part)
        row.order[place] = part
    row.gray, row.blur, row.sigma = u[9] < view.gray, u[10] < view.blur, _within(view.sigma, u[11])
    row.solarize, row.equalize, row.flip = u[12] < view.solarize, u[13] < view.equalize, u[14] < view.flip


# --- the image ---------------------------------------------------------------------------------------------------------


@fast
def _crop(
    pixels: Array, row: Any, view: Any, down: Any, across: Any, source: Array, lines: Array, x: Array, out: Array, after: Array
) -> None:
    """The box of an image [H * W * C] -> x [C * S * S]: down its columns, then along its rows and to planes.

    Memory comes slowly: that of ``out``, where `_colour` writes in the end, and the image ``after`` this one are fetched
    meanwhile, evenly. Blocks of lanes go backwards, as what a row's last one writes too much is the next row's beginning.
    """
    size = U(view.size)
    channels = U(len(out)) // (size * size)
    full = U(view.width) * channels
    top, left, height, width = U(row.box[0]), U(row.box[1]), U(row.box[2]), U(row.box[3])
    for i in range(height * full):
        source[i] = f32(pixels[top * full + i])
    n, share, coming = width * channels, U(len(after)) // size, U(0)
    pitch = (n + LANES - U(1)) // LANES * LANES
    first, weight, taps = down[0][height], down[1][height], U(down[2][height])
    for y in range(size):
        for _ in range(U(0), size * channels, U(2) * CACHE_LINE):
            fetch(out, coming)
            coming += CACHE_LINE
        for i in range(U(0), share, U(4) * CACHE_LINE):
            fetch(after, y * share + i)
        _down(source, U(first[y]) * full + left * channels, full, weight[y], taps, lines, y * pitch, n)  # [S, w, C]
    first, weight, blocks = across[0][width], across[1][width], U(across[0].shape[1])
    step = U(0) - channels if row.flip else channels
    for c in range(channels):
        for block in range(blocks):
            b = blocks - U(1) - block
            start, taps = U(first[b]), U(across[2][width, b])
            band = weight[b]
            start = (width - U(1) - start if row.flip else start) * channels + c
            for y in range(U(0), size, U(4)):
                fetch(out, coming)
                coming += CACHE_LINE
                _along(lines, start + y * pitch, pitch, step, band, taps, x, (c * size + y) * size + b * LANES, size)


@inlined
def _down(source: Array, start: U, pitch: U, weight: Array, taps: U, target: Array, to: U, n: U) -> None:
    """target[to + i] = sum over k of weight[k] * source[start + k * pitch + i], for n i; at least four weights exist."""
    a, b, c, d = weight[0], weight[1], weight[2], weight[3]
    p, q, r, s = start, start + pitch, start + U(2) * pitch, start + U(3) * pitch
    for i in range(U(0), n, LANES):
        total = plus(plus(zeros(), a, load(source, p + i)), b, load(source, q + i))
        store(target, to + i, plus(plus(total, c, load(source, r + i)), d, load(source, s + i)))
    for k in range(U(4), taps):
        a, p = weight[k], start + k * pitch
        for i in range(U(0), n, LANES):
            store(target, to + i, plus(load(target, to + i), a, load(source, p + i)))


@inlined
def _along(source: Array, start: U, pitch: U, step: U, weight: Array, taps: U, target: Array, to: U, size: U) -> None:
    """In four rows: target[to + i] = sum over k of source[start + k * step] * weight[k * LANES + i], within 0..1."""
    a = b = c = d = zeros()
    p, q, r, s = start, start + pitch, start + U(2) * pitch, start + U(3) * pitch
    at = U(0)
    for k in range(taps):
        lanes = load(weight, k * LANES)
        a, b = plus(a, source[p + at], lanes), plus(b, source[q + at], lanes)
        c, d = plus(c, source[r + at], lanes), plus(d, source[s + at], lanes)
        at += step
    store(target, to, clamp(a))
    store(target, to + size, clamp(b))
    store(target, to + U(2) * size, clamp(c))
    store(target, to + U(3) * size, clamp(d))


@fast
def _jitter(x: Array, row: Any, neutral: Array) -> None:
    for part in row.order:
        if row.factors[part] == neutral[part]:
            continue
        factor = f32(row.factors[part])
        if part == 0:
            for c in range(len(x)):
                _towards(x[c], ZERO, factor)
        elif part == 1:
            grey = _mean_luma(x)
            for c in range(len(x)):
                _towards(x[c], grey, factor)
        elif len(x) == 3:
            if part == 2:
                _saturation(x[0], x[1], x[2], factor)
            else:
                _hue(x[0], x[1], x[2], factor)


@fast
def _towards(plane: Array, grey: f32, factor: f32) -> None:
    rest = (ONE - factor) * grey
    for i in range(len(plane)):
        plane[i] = min(max(plane[i] * factor + rest, ZERO), ONE)


@fast
def _mean_luma(x: Array) -> f32:
    total = ZERO
    if len(x) == 1:
        for i in range(x.shape[1]):
            total += x[0, i]
    else:
        r, g, b = x[0], x[1], x[2]
        for i in range(len(r)):
            total += R * r[i] + G * g[i] + B * b[i]
    return total / f32(x.shape[1])


@fast
def _saturation(r: Array, g: Array, b: Array, factor: f32) -> None:
    for i in range(len(r)):
        rest = (ONE - factor) * (R * r[i] + G * g[i] + B * b[i])
        r[i] = min(max(r[i] * factor + rest, ZERO), ONE)
        g[i] = min(max(g[i] * factor + rest, ZERO), ONE)
        b[i] = min(max(b[i] * factor + rest, ZERO), ONE)


@fast
def _hue(r: Array, g: Array, b: Array, shift: f32) -> None:
    """Back from HSV a channel is its least plus chroma times how near the hue, in sixths of a turn, is to the channel's."""
    for i in range(len(r)):
        red, green, blue = r[i], g[i], b[i]
        value, least = max(red, max(green, blue)), min(red, min(green, blue))
        chroma = value - least
        inverse = ONE / (chroma if chroma > ZERO else ONE)
        six = (red - green) * inverse + FOUR
        six = (blue - red) * inverse + TWO if value == green else six
        six = (green - blue) * inverse if value == red else six
        six += SIX * shift
        six -= SIX * np.floor(six * (ONE / SIX))
        r[i] = least + chroma * min(max(abs(six - THREE) - ONE, ZERO), ONE)
        g[i] = least + chroma * min(max(TWO - abs(six - TWO), ZERO), ONE)
        b[i] = least + chroma * min(max(TWO - abs(six - FOUR), ZERO), ONE)


@fast
def _gray(r: Array, g: Array, b: Array) -> None:
    for i in range(len(r)):
        r[i] = g[i] = b[i] = R * r[i] + G * g[i] + B * b[i]


@fast
def _blur(x: Array, size: U, sigma: float, taps: Array, wide: Array, tall: Array) -> None:
    """x [C, S * S] blurred in place along both axes, reflected at the border.

    Both passes run over whole planes: ``wide`` and ``tall`` [S + 2 R, S + 2 R] flat, whose lines have room for R
    reflected pixels at either end, and above and below.
    """
    reach, radius = U(len(taps) - 1), U(_gauss(sigma, int(size), taps))
    pitch = size + U(2) * reach
    top, bottom = reach * pitch, (reach + size - U(1)) * pitch
    for plane in x:
        for y in range(size):
            source, target = y * size, y * pitch + reach
            for i in range(size):
                wide[target + i] = plane[source + i]
            for k in range(U(1), radius + U(1)):
                wide[target - k] = plane[source + k]
                wide[target + size - U(1) + k] = plane[source + size - U(1) - k]
        _smooth(wide, int(reach), 1, taps, int(radius), tall[top : top + size * pitch - U(2) * reach])
        for k in range(U(1), radius + U(1)):
            for i in range(size):
                tall[top - k * pitch + i] = tall[top + k * pitch + i]
                tall[bottom + k * pitch + i] = tall[bottom - k * pitch + i]
        _smooth(tall, int(top), int(pitch), taps, int(radius), wide[: size * pitch])
        for y in range(size):
            source, target = y * pitch, y * size
            for i in range(size):
                plane[target + i] = wide[source + i]


@exact
def _gauss(sigma: float, size: int, taps: Array) -> int:
    """One side of the Gaussian, as far as three standard deviations or the reflection reach: how many, besides taps[0]."""
    radius, total = min(int(math.ceil(3 * sigma)), size - 1), 1.0
    for k in range(1, radius + 1):
        total += 2 * math.exp(-0.5 * (k / sigma) ** 2)
    for k in range(radius + 1):
        taps[k] = f32(math.exp(-0.5 * (k / sigma) ** 2) / total)
    return radius


@fast
def _smooth(source: Array, start: int, step: int, taps: Array, radius: int, target: Array) -> None:
    """target[i] = sum over |k| <= radius of taps[|k|] * source[start + i + k * step], two k at a time."""
    n = len(target)
    for k in range(1, radius + 1, 2):
        near, far, last = taps[k], taps[k + 1] if k < radius else ZERO, min(k + 1, radius)
        a, b = source[start - k * step :][:n], source[start + k * step :][:n]
        c, d = source[start - last * step :][:n], source[start + last * step :][:n]
        if k == 1:
            centre, middle = taps[0], source[start:][:n]
            for i in range(n):
                target[i] = centre * middle[i] + near * (a[i] + b[i]) + far * (c[i] + d[i])
        else:
            for i in range(n):
                target[i] += near * (a[i] + b[i]) + far * (c[i] + d[i])


@fast
def _solarize(plane: Array, threshold: f32) -> None:
    for i in range(len(plane)):
        plane[i] = ONE - plane[i] if plane[i] >= threshold else plane[i]


@exact
def _equalize(plane: Array, levels: Array) -> None:
    """As torchvision: through 256 levels, Pillow's rounding, and unchanged where there are too few pixels to spread."""
    levels[:] = 0
    for i in range(len(plane)):
        levels[min(int(plane[i] * f32(255.999)), 255)] += 1
    last = 255
    while levels[last] == 0:
        last -= 1
    step = (len(plane) - levels[last]) // 255
    total = 0
    for level in range(256):
        count, levels[level] = levels[level], level if step == 0 else min((total + step // 2) // step, 255)
        total += count
    for i in range(len(plane)):
        plane[i] = f32(levels[min(int(plane[i] * f32(255.999)), 255)]) * f32(1 / 255)


@fast
def _load(source: Array, channel: int, plane: Array) -> None:
    for i in range(len(plane)):
        plane[i] = f32(source[i, channel]) * f32(1 / 255)


@fast
def _store(plane: Array, scale: f32, shift: f32, target: Array) -> None:
    for i in range(len(plane)):
        target[i] = plane[i] * scale + shift


@exact
def _colour(x: Array, row: Any, view: Any, planes: Any, scale: Array, shift: Array, out: Array) -> None:
    """What comes after the crop, in place in x [C, S * S]; then times ``scale`` plus ``shift`` to ``out``."""
    taps, wide, tall, levels = planes
    if row.jitter:
        _jitter(x, row, view.neutral)
    if row.gray and len(x) == 3:
        _gray(x[0], x[1], x[2])
    if row.blur:
        _blur(x, U(view.size), row.sigma, taps, wide, tall)
    for c in range(len(x)):
        if row.solarize:
            _solarize(x[c], f32(view.threshold))
        if row.equalize:
            _equalize(x[c], levels)
        _store(x[c], scale[c], shift[c], out[c])


@exact
def _work(view: Any, channels: int, taps: int) -> tuple[Array, ...]:
    """The memory of one thread, for `_crop`. What reads past its contents meets weights of zero or is written over."""
    height, width, size = view.height, view.width, view.size
    return (
        np.zeros((height + taps) * width * channels + WIDTH, f32),
        np.zeros((size + 3) * (width * channels + WIDTH), f32),
        np.zeros((channels * size + 3) * size + WIDTH, f32),
    )


@exact
def _planes(view: Any) -> tuple[Array, ...]:
    """What `_colour` needs besides the image."""
    pitch = view.size + 2 * view.reach
    return (
        np.zeros(view.reach + 1, f32),
        np.zeros(pitch * pitch, f32),
        np.zeros(pitch * pitch, f32),
        np.zeros(256, np.int64),
    )


@kept
def draw(seed: int, epoch: int, number: int, samples: Array, view: Any, rows: Array) -> None:
    """What happens to view ``number`` of each sample, as `solo.data.views.sample` draws it, into ``rows`` [n]."""
    u, word = np.zeros(15), _mix(_mix(_mix(U(seed)) ^ U(epoch)) ^ U(number))
    for i in range(len(samples)):
        _draw(_mix(word ^ U(samples[i])), view, rows[i], u)


@kept
def render(
    images: Array, shown: Array, rows: Array, view: Any, down: Any, across: Any, scale: Array, shift: Array, out: Array
) -> None:
    """Do to images [N, H * W * C] uint8, those of ``shown`` [n], what ``rows`` [n] say; times ``scale`` plus ``shift``.

    Args:
        down: the columns' `solo.data.engines.kernel_numba._taps`.
        across: the rows' `solo.data.engines.kernel_numba._bands`.
        out: [n, C, S * S] float32, written.
    """
    source, lines, flat = _work(view, out.shape[1], down[1].shape[2])
    x, planes = flat[: out.shape[1] * out.shape[2]].reshape(out.shape[1:]), _planes(view)
    for i in range(len(rows)):
        after = images[shown[min(i + 1, len(rows) - 1)]]
        _crop(images[shown[i]], rows[i], view, down, across, source, lines, flat, out[i].reshape(-1), after)
        _colour(x, rows[i], view, planes, scale, shift, out[i])


@kept
def finish(crops: Array, rows: Array, view: Any, scale: Array, shift: Array, out: Array) -> None:
    """The same but for the crop, which is done: crops [n, S * S, C] uint8 -> ``out`` [n, C, S * S] float32."""
    x, planes = np.zeros(out.shape[1:], f32), _planes(view)
    for i in range(len(rows)):
        for c in range(len(x)):
            _load(crops[i], c, x[c])
        _colour(x, rows[i], view, planes, scale, shift, out[i])
