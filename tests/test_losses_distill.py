"""CKD against plain float64 loops; where its gradients go; values and gradients where little or nothing is valid."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import interpolate
from fsmde_jax.expectation import EXPECTATIONS
from fsmde_jax.losses import distill

B, H, W, K = 2, 8, 12, 8
HEAD = (4, 6)
NAMES = ["none", "one", "camera_out", "rig_out", "all"]


def _case(name, n=4, seed=0):
    """Student logits, centers, teacher logits, mask, depth, label mask; float32."""
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(0, 2, (B, n, *HEAD, K)).astype(np.float32) for _ in range(2))
    centers = np.sort(np.exp(rng.uniform(0, 4, (B, n, 1, 1, K))), -1).astype(np.float32)
    depth = np.exp(rng.uniform(0, 4, (B, n, H, W))).astype(np.float32)
    labels = rng.random(depth.shape) < 0.4
    mask = rng.random((B, n, *HEAD)) < 0.9
    if name == "none":
        mask[:] = False
    elif name == "one":
        mask[:], labels[:] = False, False
        mask[1, 0, 0, 0] = labels[1, 0, 0, 0] = True  # the corner is interpolated from the corner alone
    elif name == "camera_out":
        mask[:, 0] = False
    elif name == "rig_out":
        mask[0] = False
    else:
        mask[:] = labels[:] = True
    return student, centers, teacher, mask, np.where(labels, depth, 0).astype(np.float32), labels


def _log_softmax(z):
    z = np.asarray(z, np.float64)
    return z - z.max() - np.log(np.sum(np.exp(z - z.max())))


def _prob_reference(student, teacher, mask, tau):
    rigs = []
    for b in range(len(mask)):
        values = []
        for index in np.argwhere(mask[b]):
            p, q = (_log_softmax(z[b][tuple(index)].astype(np.float64) / tau) for z in (teacher, student))
            values.append(sum(np.exp(p[k]) * (p[k] - q[k]) for k in range(K)))
        if values:
            rigs.append(np.mean(values))
    return tau**2 * np.mean(rigs) if rigs else 0.0


def _taps(i, src, dst):
    """Source pixels and weights of output pixel i: half-pixel bilinear, border clamped."""
    x = min(max((i + 0.5) * src / dst - 0.5, 0.0), src - 1)
    low = min(int(np.floor(x)), src - 1)
    high = min(low + 1, src - 1)
    return [(j, w) for j, w in ((low, 1 - (x - low)), (high, x - low)) if w > 0]


def _expected(log_p, centers, expectation):
    if expectation == "log":
        return np.exp(np.sum(np.exp(log_p) * np.log(centers), -1))
    return np.sum(np.exp(log_p) * centers, -1)


def _cross_reference(teacher, centers, mask, depth, labels, lam=0.85, expectation="log"):
    full = np.broadcast_to(centers.astype(np.float64), teacher.shape)
    (h, w), rigs = mask.shape[2:], []
    for b in range(len(mask)):
        errors = []
        for n, y, x in np.argwhere(labels[b]):
            taps = [(v, u, a * c) for v, a in _taps(y, h, depth.shape[2]) for u, c in _taps(x, w, depth.shape[3])]
            if all(mask[b, n, v, u] for v, u, _ in taps):
                value = sum(
                    c * _expected(_log_softmax(teacher[b, n, v, u]), full[b, n, v, u], expectation) for v, u, c in taps
                )
                errors.append(np.log(value) - np.log(float(depth[b, n, y, x])))
        if errors:
            rigs.append(np.sqrt(max(np.mean(np.square(errors)) - lam * np.mean(errors) ** 2, 0.0)))
    return np.mean(rigs) if rigs else 0.0


@functools.partial(jax.jit, static_argnames="tau")
def _prob(student, teacher, mask, tau):
    return jax.value_and_grad(lambda s, t: distill.probability_loss(s, t, mask, tau=tau), (0, 1))(student, teacher)


@functools.partial(jax.jit, static_argnames="expectation")
def _cross(teacher, centers, mask, depth, labels, expectation="log"):
    def loss(centers, teacher):
        return distill.crossing_loss(teacher, centers, mask, depth, labels, expectation=expectation)

    return jax.value_and_grad(loss, (0, 1))(centers, teacher)


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("name", NAMES)
def test_probability_loss_value_and_gradient(name, tau):
    student, _, teacher, mask, _, _ = _case(name)
    expected = _prob_reference(student, teacher, mask, tau)
    for array in (student, teacher):
        array[~mask] = np.nan  # what is masked must not matter at all
    value, (gradient, of_teacher) = _prob(student, teacher, mask, tau)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-9)
    assert np.all(np.asarray(of_teacher) == 0)
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all() and (gradient[~mask] == 0).all()
    assert (name == "none") == (not gradient.any())


@pytest.mark.parametrize("n", [1, 6])
def test_any_number_of_cameras(n):
    student, centers, teacher, mask, depth, labels = _case("camera_out" if n > 1 else "rig_out", n=n, seed=n)
    np.testing.assert_allclose(
        _prob(student, teacher, mask, 1.0)[0], _prob_reference(student, teacher, mask, 1.0), rtol=1e-5
    )
    np.testing.assert_allclose(
        _cross(teacher, centers, mask, depth, labels)[0],
        _cross_reference(teacher, centers, mask, depth, labels),
        rtol=1e-5,
    )


def test_probability_gradient_is_that_of_float64_differences():
    student, _, teacher, mask, _, _ = _case("camera_out", seed=1)
    gradient = np.asarray(_prob(student, teacher, mask, 2.5)[1][0])
    for index in [(*map(int, i), k) for k, i in enumerate(np.argwhere(mask)[:: len(np.argwhere(mask)) // 5])]:
        up, down = student.astype(np.float64), student.astype(np.float64)
        up[index] += 1e-5
        down[index] -= 1e-5
        expected = (_prob_reference(up, teacher, mask, 2.5) - _prob_reference(down, teacher, mask, 2.5)) / 2e-5
        np.testing.assert_allclose(gradient[index], expected, rtol=1e-4, atol=1e-8)


def test_probability_loss_of_equal_logits_is_zero_with_zero_gradient():
    student, _, _, mask, _, _ = _case("camera_out")
    for tau, shift in ((1.0, 0.0), (2.5, 0.0), (1.0, 3.0)):  # logits are known up to a constant
        value, (gradient, _) = _prob(student, student + np.float32(shift), mask, tau)
        np.testing.assert_allclose(value, 0.0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-7)


def test_probability_loss_with_constant_logits_and_certain_teachers():
    student, _, teacher, mask, _, _ = _case("all")
    np.testing.assert_allclose(_prob(0 * student, 0 * teacher, mask, 1.0)[0], 0.0, atol=1e-7)
    one_hot = np.where(np.arange(K) == 3, 0.0, -np.inf).astype(np.float32) + 0 * teacher
    value, (gradient, _) = _prob(student, one_hot, mask, 1.0)
    log_q = np.apply_along_axis(_log_softmax, -1, student)
    np.testing.assert_allclose(value, -log_q[..., 3].mean(), rtol=1e-5)
    assert np.isfinite(gradient).all()
    far_off = np.where(np.arange(K) == 0, 200.0, -200.0).astype(np.float32) + 0 * student
    value, (gradient, _) = _prob(far_off, teacher, mask, 1.0)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_a_broken_student_is_not_hidden():
    student, centers, teacher, mask, depth, labels = _case("all")
    student[0, 0, 0, 0, 0] = centers[0, 0, 0, 0, 0] = np.nan
    assert np.isnan(_prob(student, teacher, mask, 1.0)[0])
    assert np.isnan(_cross(teacher, centers, mask, depth, labels)[0])


@pytest.mark.parametrize("name", NAMES)
def test_crossing_loss_value_and_gradient(name):
    _, centers, teacher, mask, depth, labels = _case(name)
    expected = _cross_reference(teacher, centers, mask, depth, labels)
    teacher[~mask] = np.nan
    value, (gradient, of_teacher) = _cross(teacher, centers, mask, depth, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=2e-7)  # float32 of a log depth near 0
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all() and np.all(np.asarray(of_teacher) == 0)
    assert (name == "none") == (not gradient.any())
    assert name not in ("camera_out", "rig_out") or not gradient[0, 0].any()


def test_crossing_gradient_is_that_of_float64_differences_also_for_centers_per_pixel():
    _, centers, teacher, mask, depth, labels = _case("camera_out", seed=2)
    per_pixel = np.broadcast_to(centers, teacher.shape).copy()
    value, (gradient, _) = _cross(teacher, per_pixel, mask, depth, labels)
    whole, (summed, _) = _cross(teacher, centers, mask, depth, labels)
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    np.testing.assert_allclose(gradient.sum((2, 3), keepdims=True), summed, rtol=1e-4, atol=1e-7)
    for index in [(0, 1, 0, 0, 2), (1, 3, 0, 0, K - 1)]:
        up, down = centers.astype(np.float64), centers.astype(np.float64)
        up[index] += 1e-4
        down[index] -= 1e-4
        high, low = (_cross_reference(teacher, c, mask, depth, labels) for c in (up, down))
        np.testing.assert_allclose(summed[index], (high - low) / 2e-4, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("expectation", EXPECTATIONS)
def test_crossing_depth_of_a_certain_teacher_is_its_center(expectation):
    centers = np.array([1.7, 3.3, 9.1], np.float32)[None, None, None, None]
    logits = np.where(np.arange(3) == 1, 200.0, 0.0).astype(np.float32) * np.ones((1, 1, *HEAD, 1), np.float32)
    depth = distill.crossing_depth(logits, centers, (H, W), expectation)
    assert depth.shape == (1, 1, H, W)
    np.testing.assert_allclose(depth, np.float32(3.3), rtol=0 if expectation == "depth" else 1e-6)


@pytest.mark.parametrize("expectation", EXPECTATIONS)
def test_crossing_depth_resizes_depth_as_the_students(expectation):
    _, centers, teacher, *_ = _case("all")
    head = _expected(np.apply_along_axis(_log_softmax, -1, teacher), centers, expectation)
    rows, columns = (interpolate.resize_matrix(*s).astype(np.float64) for s in ((HEAD[0], 11), (HEAD[1], 9)))
    expected = np.einsum("bnhw,Hh,Ww->bnHW", head, rows, columns)
    np.testing.assert_allclose(distill.crossing_depth(teacher, centers, (11, 9), expectation), expected, rtol=1e-5)


def test_a_label_counts_only_where_the_teacher_says_all_of_it():
    mask = np.ones((1, 1, *HEAD), bool)
    mask[0, 0, 1, 2] = False
    found = np.asarray(distill.crossing_mask(mask, (H, W)))[0, 0]
    expected = np.ones((H, W), bool)
    expected[1:5, 3:7] = False  # head pixel 1 reaches output pixels 1..4, head pixel 2 reaches 3..6
    np.testing.assert_array_equal(found, expected)
    _, centers, teacher, _, depth, labels = _case("all", n=1)
    one = (teacher[:1], centers[:1], mask)
    value = _cross(*one, depth[:1], labels[:1])[0]
    wrong = np.where(expected, depth[:1], 1e3).astype(np.float32)
    assert value == _cross(*one, wrong, labels[:1])[0]


OPTIONS = {"tau": 2.0, "silog_lambda": 0.5}
WEIGHTS = [(1.0, 1.0), (0.7, 0.0), (0.0, 0.3), (0.0, 0.0)]


@pytest.mark.parametrize(("w_prob", "w_cross"), WEIGHTS)
def test_ckd_is_the_weighted_sum_and_a_weight_of_zero_leaves_its_term_out(w_prob, w_cross):
    case = _case("camera_out", seed=3)
    student, centers, teacher, mask, depth, labels = case
    run = functools.partial(distill.ckd_loss, w_prob=w_prob, w_cross=w_cross, **OPTIONS)
    (loss, terms), (of_student, of_centers, of_teacher) = jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(
        *case
    )
    prob = _prob_reference(student, teacher, mask, 2.0)
    cross = _cross_reference(teacher, centers, mask, depth, labels, lam=0.5)
    np.testing.assert_allclose(loss, w_prob * prob + w_cross * cross, rtol=1e-5)
    assert set(terms) == {"ckd"} | ({"ckd_prob"} if w_prob else set()) | ({"ckd_cross"} if w_cross else set())
    assert float(terms["ckd"]) == float(loss)
    # L_prob moves the logits, L_cross the centers, and nothing the teacher
    assert np.any(of_student != 0) == (w_prob > 0) and np.any(of_centers != 0) == (w_cross > 0)
    assert not np.any(of_teacher != 0)

    jaxpr = jax.make_jaxpr(run)(*case).jaxpr
    used = {id(v) for equation in jaxpr.eqns for v in equation.invars}
    assert [id(v) in used for v in jaxpr.invars] == [
        w_prob > 0, w_cross > 0, bool(w_prob or w_cross), bool(w_prob or w_cross), w_cross > 0, w_cross > 0
    ]  # fmt: skip


def test_permuting_the_cameras_changes_nothing():
    case = _case("camera_out", seed=4)
    order = [2, 0, 3, 1]
    moved = [x[:, order] for x in case]
    run = jax.jit(lambda *x: distill.ckd_loss(*x)[0])
    np.testing.assert_allclose(run(*moved), run(*case), rtol=1e-6)


def test_shapes_and_temperature_are_checked():
    student, centers, teacher, mask, depth, labels = _case("all")
    for arguments, match in [
        ((student[..., :-1], teacher, mask), "equal"),
        ((student, teacher, mask[:, 1:]), "mask"),
    ]:
        with pytest.raises(ValueError, match=match):
            distill.probability_loss(*arguments)
    with pytest.raises(ValueError, match="tau"):
        distill.probability_loss(student, teacher, mask, tau=0.0)
    with pytest.raises(ValueError, match="crossing_depth"):
        distill.crossing_depth(teacher, centers[:, :, :, 0], (H, W), "log")
    with pytest.raises(ValueError, match="crossing_loss"):
        distill.crossing_loss(teacher, centers, mask[:, 1:], depth, labels)
