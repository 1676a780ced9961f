"""How much moves in a clip, the motion_bucket_id that follows from it, and whether a model's clips still move.

    score(frames, seconds)      how fast what moves fastest moves, by optical flow: picture lengths a second
    buckets(scores)             1 to 255 by rank: the stillest clip of a data set, the median at 128, the liveliest

The score is the mean speed of the fastest twentieth of all pixels, not of all: a bird that crosses the sky moves, though most of the
picture stands still. 1 is the picture's longer side in one second. SVD's own measure was never published.
"""

import logging

import numpy as np

logger = logging.getLogger("svd_xtend")

FLOW_SIDE = 128  # pixels of the longer side at which flow is computed: faster, and blind to grain
FASTEST = 20  # one in so many pixels counts
PAIRS, SPOTS = 8, 4  # pairs of frames that are looked at in a clip, and places of a long one
EVERY = 1 / 8  # seconds between the frames of a pair, about
BLUE, ORANGE = "#5584e6", "#e2702c"
COLLAPSED = 1 / 3  # of what the true clips move


def shrink_frame(frame):
    """(h, w, 3) uint8, its longer side LENGTH pixels."""
    import cv2

    h, w = frame.shape[:2]
    k = FLOW_SIDE / max(h, w)
    size = max(round(w * k), 16), max(round(h * k), 16)  # flow needs some pixels
    return cv2.resize(frame, size, interpolation=cv2.INTER_AREA if k < 1 else cv2.INTER_CUBIC)


def optical_flow(before, after):
    """Optical flow between two small grey frames (Kroeger et al. 2016, by OpenCV): the mean length, in picture lengths, over
    the fastest twentieth of the pixels."""
    import cv2

    way = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_ULTRAFAST).calc(before, after, None)
    far = np.linalg.norm(way, axis=-1).ravel()
    count = max(len(far) // FASTEST, 1)
    return float(np.partition(far, -count)[-count:].mean() / max(before.shape))


def motion_score(frames, seconds):
    """Motion of frames (f, h, w, 3) uint8, or PIL images of one size, that are `seconds` apart: picture lengths a second."""
    import cv2

    small = [cv2.cvtColor(shrink_frame(np.asarray(frame)), cv2.COLOR_RGB2GRAY) for frame in frames]
    return (
        float(np.mean([optical_flow(a, b) for a, b in zip(small, small[1:])])) / seconds
        if len(small) > 1
        else 0.0
    )


def frame_runs(count, rate, keys=(0,)):
    """Which frames of a clip to look at: lists of numbers, equally far apart within a list. All of a short clip; of a long one
    SPOTS places, each from a keyframe (`keys`) on, where there are some, so that little else is decoded."""
    step = min(max(round(rate * EVERY), 1), max(count - 1, 1))
    if count <= PAIRS * step + 1:
        return [np.arange(0, count, step)]
    each = PAIRS // SPOTS
    starts = np.linspace(0, count - 1 - each * step, SPOTS).round().astype(int)
    keys = np.asarray(keys)
    keys = keys[keys <= starts[-1]]
    starts = keys[np.searchsorted(keys, starts, side="right") - 1] if len(keys) else starts
    return [start + step * np.arange(each + 1) for start in np.unique(starts)]


def clip_motion(read, count, rate, keys=(0,)):
    """Score of a clip of `count` frames at `rate` a second. read(numbers): yields these, (h, w, 3) uint8."""
    scores = [
        motion_score(read(run), (run[1] - run[0]) / rate)
        for run in frame_runs(count, rate, keys)
        if len(run) > 1
    ]
    return float(np.mean(scores)) if scores else 0.0


def motion_buckets(scores):
    """motion_bucket_id of each of `scores`, 1 to 255 by rank among them; equal ones share the mean of their ranks."""
    scores = np.asarray(scores, np.float64)
    order = np.sort(scores)
    rank = (np.searchsorted(order, scores) + np.searchsorted(order, scores, side="right")) / 2
    return 1 + 254 * rank / max(len(scores), 1)


def draw_motion(axes, scores):
    """How motion is distributed over a data set, and the bucket that a score gets, into a plot's axes."""
    scores = np.asarray(scores, np.float64)
    axes.hist(scores, bins=min(60, max(10, len(scores) // 5)), color=BLUE)
    axes.set(xlabel="motion, picture lengths a second", ylabel="clips")
    other, ranked = axes.twinx(), np.argsort(scores)
    other.plot(scores[ranked], motion_buckets(scores)[ranked], color=ORANGE, lw=2)
    other.set_ylabel("motion_bucket_id", color=ORANGE)
    other.set(ylim=(0, 256), yticks=[1, 64, 128, 192, 255])


def plot_motion(file, scores, title):
    """A picture of it."""
    from matplotlib.figure import Figure

    figure = Figure((7, 3.2), layout="constrained")
    axes = figure.add_subplot(title=title)
    draw_motion(axes, scores)
    figure.savefig(file, dpi=110)


def compare_motion(step, rows):
    """What moves in the clips of a validation beside what moves in the true ones: (the row of <output_dir>/motion.jsonl, the
    means, to log); warns where the model has stopped moving. rows: [(name, generated, true score or None)]."""
    generated, true = (
        float(np.mean([g for _, g, _ in rows])),
        [t for *_, t in rows if t is not None],
    )
    told = {"motion": generated, **({"motion_truth": float(np.mean(true))} if true else {})}
    paired = [(g, t) for _, g, t in rows if t is not None]
    if paired and sum(g for g, _ in paired) < COLLAPSED * sum(t for _, t in paired):
        logger.warning(
            "step %d: motion collapses: the rendered clips move %.3g picture lengths a second, the true ones %.3g. Look at them; "
            "lower --learning_rate, check fps and motion_bucket_id of the data (prepare_data.py check)", step,
            np.mean([g for g, _ in paired]), told["motion_truth"],
        )  # fmt: skip
    clips = {name: {"motion": g, "motion_truth": t} for name, g, t in rows}
    return {"step": step, **told, "clips": clips}, told
