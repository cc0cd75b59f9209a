"""VRKD against plain float64 loops, its invariances, and gradients where tokens are few, absent or all alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax.losses import relational

B, GRID, CS, CT = 2, (2, 3), 5, 8
T = GRID[0] * GRID[1]
NAMES = ["none", "one", "camera_out", "rig_out", "all"]


def _ring(n, intra=False):
    """Each camera with its two neighbours, as on both real rigs; [B, n, n]."""
    distance = np.abs(np.arange(n)[:, None] - np.arange(n))
    ring = (np.minimum(distance, n - distance) == 1) | (intra & np.eye(n, dtype=bool))
    return np.broadcast_to(ring, (B, n, n)).copy()


def _case(name, n=4, seed=0, intra=False):
    """Student and teacher tokens float32, pairs, token mask."""
    rng = np.random.default_rng(seed)
    # a mean per channel much larger than what differs, as features have
    student = (rng.normal(size=(B, n, *GRID, CS)) + rng.normal(0, 3, CS)).astype(np.float32)
    teacher = (rng.normal(size=(B, n, *GRID, CT)) + rng.normal(0, 3, CT)).astype(np.float32)
    mask = rng.random((B, n, *GRID)) < 0.8
    if name == "none":
        mask[:] = False
    elif name == "one":
        mask[:] = False
        mask[1, 0, 1, 1] = True
    elif name == "camera_out":
        mask[:, 0] = False
    elif name == "rig_out":
        mask[0] = False
    else:
        mask[:] = True
    return student, teacher, _ring(n, intra), mask


def _units(tokens, mask, center):
    """float64 unit vectors [B, N, T, C]; tokens [B, N, T, C], mask [B, N, T]."""
    out = np.zeros(tokens.shape)
    for b, i in np.ndindex(*mask.shape[:2]):
        rig = tokens[b][mask[b]] if center == "rig" else tokens[b, i][mask[b, i]]
        mean = rig.mean(0) if len(rig) and center != "none" else 0.0
        for t in np.flatnonzero(mask[b, i]):
            x = tokens[b, i, t] - mean
            out[b, i, t] = x / np.linalg.norm(x) if np.linalg.norm(x) > 1e-9 else 0.0
    return out


def _softmax(x):
    e = np.exp(np.asarray(x) - np.max(x))
    return e / e.sum()


def _reference(student, teacher, pairs, mask, tau_r=0.1, center="rig"):
    """(loss, per-pair means [B, N, N]) in float64."""
    flat = mask.reshape(*mask.shape[:2], -1)
    sides = [_units(x.astype(np.float64).reshape(*flat.shape, -1), flat, center) for x in (teacher, student)]
    values, rigs = np.zeros(pairs.shape), []
    for b in range(len(pairs)):
        rows_of_rig = []
        for i, j in np.argwhere(pairs[b]):
            rows = []
            for t in np.flatnonzero(flat[b, i]):
                columns = [s for s in np.flatnonzero(flat[b, j]) if (i, t) != (j, s)]
                if columns:
                    p, q = (_softmax([f[b, i, t] @ f[b, j, s] / tau_r for s in columns]) for f in sides)
                    rows.append(sum(a * np.log(a / c) for a, c in zip(p, q, strict=True)))
            values[b, i, j] = np.mean(rows) if rows else 0.0
            rows_of_rig += rows
        if rows_of_rig:
            rigs.append(np.mean(rows_of_rig))
    return (np.mean(rigs) if rigs else 0.0), values


def _gram_reference(student, teacher, pairs, mask, center="rig"):
    flat = mask.reshape(*mask.shape[:2], -1)
    seen = flat.any(-1)
    sides = []
    for x in (teacher, student):
        x = x.astype(np.float64).reshape(*flat.shape, -1)
        views = np.array([[x[b, i][flat[b, i]].mean(0) if seen[b, i] else 0 * x[b, i, 0] for i in range(flat.shape[1])]
                          for b in range(len(x))])  # fmt: skip
        sides.append(_units(views[:, :, None], seen[..., None], center)[:, :, 0])
    rigs = []
    for b in range(len(pairs)):
        values = [
            (sides[0][b, i] @ sides[0][b, j] - sides[1][b, i] @ sides[1][b, j]) ** 2
            for i, j in np.argwhere(pairs[b])
            if i != j and seen[b, i] and seen[b, j]
        ]
        if values:
            rigs.append(np.mean(values))
    return np.mean(rigs) if rigs else 0.0


@functools.partial(jax.jit, static_argnames=("tau_r", "center"))
def _relation(student, teacher, pairs, mask, tau_r=0.1, center="rig"):
    def loss(s, t):
        return relational.relation_loss(s, t, pairs, mask, tau_r=tau_r, center=center)

    return jax.value_and_grad(loss, (0, 1))(student, teacher)


@functools.partial(jax.jit, static_argnames=("center",))
def _gram(student, teacher, pairs, mask, center="rig"):
    def loss(s, t):
        return relational.gram_loss(s, t, pairs, mask, center=center)

    return jax.value_and_grad(loss, (0, 1))(student, teacher)


_pairs = jax.jit(relational.relation_pairs, static_argnames=("tau_r", "center"))


def _nan_where_masked(tokens, mask):
    return np.where(mask[..., None], tokens, np.nan).astype(np.float32)


@pytest.mark.parametrize("intra", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_relation_value_and_gradient(name, intra):
    student, teacher, pairs, mask = _case(name, intra=intra)
    expected, values = _reference(student, teacher, pairs, mask)
    student, teacher = (_nan_where_masked(x, mask) for x in (student, teacher))
    value, (gradient, of_teacher) = _relation(student, teacher, pairs, mask)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-9)
    gradient = np.asarray(gradient)
    assert np.isfinite(gradient).all() and (gradient[~mask] == 0).all()
    assert np.all(np.asarray(of_teacher) == 0)
    assert (name in ("none", "one")) == (not gradient.any())  # one token has no other to be related to
    found, rows = _pairs(student, teacher, pairs, mask, tau_r=0.1)
    np.testing.assert_allclose(found, values, rtol=2e-5, atol=1e-7)
    assert rows.shape == pairs.shape and not np.asarray(rows)[~pairs].any()


@pytest.mark.parametrize(("center", "tau_r"), [("view", 0.1), ("none", 0.5)])
def test_other_centers_and_temperatures(center, tau_r):
    case = _case("camera_out", seed=1)
    value = _relation(*case, tau_r=tau_r, center=center)[0]
    np.testing.assert_allclose(value, _reference(*case, tau_r=tau_r, center=center)[0], rtol=1e-5)


@pytest.mark.parametrize("n", [1, 6])
def test_any_number_of_cameras(n):
    student, teacher, pairs, mask = _case("all", n=n, seed=n, intra=n == 1)
    np.testing.assert_allclose(
        _relation(student, teacher, pairs, mask)[0], _reference(student, teacher, pairs, mask)[0], rtol=1e-5
    )
    np.testing.assert_allclose(
        _gram(student, teacher, pairs, mask)[0], _gram_reference(student, teacher, pairs, mask), rtol=1e-5
    )
    if n == 1:  # without pairs inside the view a single camera has none
        value, (gradient, _) = _relation(student, teacher, pairs & False, mask)
        assert float(value) == 0 and not np.any(gradient)


@pytest.mark.parametrize("kind", ["relation", "gram"])
def test_gradient_is_that_of_float64_differences(kind):
    student, teacher, pairs, mask = _case("camera_out", seed=2)
    run, reference = {"relation": (_relation, lambda *x: _reference(*x)[0]), "gram": (_gram, _gram_reference)}[kind]
    gradient = np.asarray(run(student, teacher, pairs, mask)[1][0])
    for k, index in enumerate(np.argwhere(mask)[::9]):
        place = (*index, k % CS)
        up, down = student.astype(np.float64), student.astype(np.float64)
        up[place] += 1e-5
        down[place] -= 1e-5
        expected = (reference(up, teacher, pairs, mask) - reference(down, teacher, pairs, mask)) / 2e-5
        np.testing.assert_allclose(gradient[place], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", ["relation", "gram"])
def test_zero_for_equal_features_and_blind_to_rotation_scale_and_shift_of_channels(kind):
    run = {"relation": _relation, "gram": _gram}[kind]
    student, teacher, pairs, mask = _case("camera_out", seed=3)
    rng = np.random.default_rng(0)
    rotate = np.linalg.qr(rng.normal(size=(CT, CT)))[0]
    turned = 7 * (teacher.astype(np.float64) @ rotate + rng.normal(size=CT))
    for same in (teacher, turned.astype(np.float32)):
        value, (gradient, _) = run(same, teacher, pairs, mask)
        np.testing.assert_allclose(value, 0.0, atol=1e-6)
        np.testing.assert_allclose(gradient, 0.0, atol=1e-5)
    before, after = run(student, teacher, pairs, mask)[0], run(student, turned.astype(np.float32), pairs, mask)[0]
    np.testing.assert_allclose(after, before, rtol=1e-5)
    assert before > 0.01


@pytest.mark.parametrize("center", ["rig", "view", "none"])
def test_a_changed_view_leaves_every_pair_without_it_unchanged(center):
    """With the rig's mean removed: as long as that mean is the same, which a new order of a view's tokens keeps."""
    student, teacher, pairs, mask = _case("all", n=6, seed=4, intra=True)
    rng = np.random.default_rng(1)
    changed, j = student.copy(), 2
    if center == "rig":
        changed[:, j] = rng.permuted(changed[:, j].reshape(B, T, CS), axis=1).reshape(B, *GRID, CS)
        difference = np.abs(changed[:, j].mean((1, 2)) - student[:, j].mean((1, 2))).max()
        assert difference < 1e-6
    else:
        changed[:, j] = rng.normal(size=changed[:, j].shape)
    before, after = (
        np.asarray(_pairs(s, teacher, pairs, mask, tau_r=0.1, center=center)[0]) for s in (student, changed)
    )
    touched = pairs & ((np.arange(6) == j)[:, None] | (np.arange(6) == j))
    np.testing.assert_allclose(after[~touched], before[~touched], rtol=1e-5, atol=1e-7)
    assert np.all(np.abs(after - before)[touched & ~np.eye(6, dtype=bool)] > 1e-3)


def test_a_dropped_view_is_as_if_it_were_not_there():
    student, teacher, pairs, mask = _case("all", seed=5)
    mask[:, 3] = False
    without = (student[:, :3], teacher[:, :3], pairs[:, :3, :3], mask[:, :3])
    for run in (_relation, _gram):
        np.testing.assert_allclose(run(student, teacher, pairs, mask)[0], run(*without)[0], rtol=1e-6)


def test_permuting_cameras_permutes_the_pairs():
    student, teacher, pairs, mask = _case("camera_out", seed=6)
    order = np.array([2, 0, 3, 1])
    moved = (student[:, order], teacher[:, order], pairs[:, order][:, :, order], mask[:, order])
    before = np.asarray(_pairs(student, teacher, pairs, mask, tau_r=0.1)[0])
    after = np.asarray(_pairs(*moved, tau_r=0.1)[0])
    np.testing.assert_allclose(after, before[:, order][:, :, order], rtol=1e-5, atol=1e-7)
    for run in (_relation, _gram):
        np.testing.assert_allclose(run(*moved)[0], run(student, teacher, pairs, mask)[0], rtol=1e-5)


@pytest.mark.parametrize("constant", ["student", "teacher", "both", "zero"])
def test_constant_features_are_finite(constant):
    """A mean rounds: without a floor relative to the features' size, rounding errors would become directions."""
    student, teacher, pairs, mask = _case("camera_out", n=6, seed=7, intra=True)
    level = 0.0 if constant == "zero" else np.float32(0.1)
    student = student if constant == "teacher" else np.full_like(student, level)
    teacher = teacher if constant == "student" else np.full_like(teacher, level)
    for run in (_relation, _gram):
        value, (gradient, _) = run(student, teacher, pairs, mask)
        assert np.isfinite(value) and np.isfinite(gradient).all()
        if constant in ("both", "zero"):
            assert float(value) == 0 and not np.any(gradient)
        if constant == "student":
            assert not np.any(gradient)  # no direction to move from


@pytest.mark.parametrize("size", [1e-15, 1e15])
def test_tiny_and_huge_features_have_finite_gradients(size):
    student, teacher, pairs, mask = _case("camera_out", seed=12)
    for run in (_relation, _gram):
        for center in ("rig", "none"):
            value, (gradient, _) = run(student * np.float32(size), teacher, pairs, mask, center=center)
            np.testing.assert_allclose(value, run(student, teacher, pairs, mask, center=center)[0], rtol=1e-5)
            assert np.isfinite(gradient).all() and np.any(gradient)


def test_a_broken_student_is_not_hidden():
    student, teacher, pairs, mask = _case("all")
    student[0, 0, 0, 0, 0] = np.nan
    assert np.isnan(_relation(student, teacher, pairs, mask)[0]) and np.isnan(_gram(student, teacher, pairs, mask)[0])


@pytest.mark.parametrize("center", ["rig", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_gram_value_and_gradient(name, center):
    student, teacher, pairs, mask = _case(name, seed=8, intra=True)
    expected = _gram_reference(student, teacher, pairs, mask, center)
    student, teacher = (_nan_where_masked(x, mask) for x in (student, teacher))
    value, (gradient, of_teacher) = _gram(student, teacher, pairs, mask, center=center)
    np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-9)
    assert np.isfinite(gradient).all() and not np.any(np.asarray(of_teacher))
    assert (name in ("none", "one")) == (not np.any(gradient))


def test_arguments_are_checked():
    student, teacher, pairs, mask = _case("all")
    for wrong in (
        (student[:, 1:], teacher, pairs, mask),
        (student, teacher, pairs[:, 1:], mask),
        (student, teacher, pairs, mask[..., 0]),
    ):
        for loss in (relational.relation_loss, relational.gram_loss):
            with pytest.raises(ValueError, match="relations"):
                loss(*wrong)
    with pytest.raises(ValueError, match="tau_r"):
        relational.relation_loss(student, teacher, pairs, mask, tau_r=0.0)
    with pytest.raises(ValueError, match="center"):
        relational.relation_loss(student, teacher, pairs, mask, center="mean")
    with pytest.raises(ValueError, match="center"):
        relational.gram_loss(student, teacher, pairs, mask, center="view")
    with pytest.raises(ValueError, match="tokens_of"):
        relational.tokens_of(student, (3, 3))
    with pytest.raises(ValueError, match="mask"):
        relational.tokens_of(student, (1, 1), mask[:, 1:])
