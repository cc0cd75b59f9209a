"""Distillation baselines against float64 PyTorch written from the papers, their invariances, and few pixels."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax.errors import ConfigError
from fsmde_jax.losses import baseline_relations, baselines, masked
from fsmde_jax.losses.baselines import BASELINES, baseline
from fsmde_jax.models.projector import Projector

torch = pytest.importorskip("torch")
F = torch.nn.functional

B, N, H, W, C, K = 2, 3, 4, 5, 6, 7
NAMES = list(BASELINES)
FEATURES = [name for name in NAMES if BASELINES[name].needs == "features"]
MASKS = ["none", "one", "some", "view_out", "rig_out", "all"]
OPTIONS = {"cwd": {"tau": 2.0}, "cirkd": {"grid": None, "tau": 0.3}, "dist": {"beta": 0.7, "gamma": 1.3, "tau": 2.0}}


@functools.cache
def value_and_slopes(name):
    """Jitted (value, (gradient of the student, gradient of the teacher))."""
    loss = functools.partial(BASELINES[name].loss, **OPTIONS.get(name, {}))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def value(name, student, teacher, mask):
    return float(value_and_slopes(name)(student, teacher, mask)[0])


def case(name, n=N, seed=0):
    """Student and teacher of a baseline, alike but not equal."""
    rng = np.random.default_rng(seed)
    needs = BASELINES[name].needs
    shape = (B, n, H, W) + {"features": (C,), "logits": (K,), "rel_inv_depth": ()}[needs]
    teacher = rng.normal(size=shape) * (2.0 if needs == "logits" else 1.0)
    student = teacher + rng.normal(size=shape)
    if needs == "rel_inv_depth":
        teacher = rng.uniform(0, 5, shape)
        student = 1 / (0.02 + 0.05 * teacher + 0.02 * rng.uniform(size=shape))
        student[0, 0] = rng.uniform(2, 40, (H, W))  # hardly related
        student[1, 0] = 2 + 10 * teacher[1, 0]  # nearer and farther the wrong way round
    return student.astype(np.float32), teacher.astype(np.float32)


def make_mask(kind, n=N, seed=1):
    rng = np.random.default_rng(seed)
    mask = np.zeros((B, n, H, W), bool)
    if kind == "one":
        mask[1, n - 1, 2, 3] = True
    elif kind in ("some", "view_out", "rig_out"):
        mask = rng.random(mask.shape) < 0.7
        mask[0, 0] &= kind != "view_out"
        mask[0] &= kind != "rig_out"
    elif kind == "all":
        mask[:] = True
    return mask


def with_rubbish(x, mask):
    """x with NaN and huge values where masked."""
    rubbish = np.where(np.arange(W) % 2, np.nan, -1e20).astype(np.float32)
    wide = mask.reshape(mask.shape + (1,) * (x.ndim - 4))
    return np.where(wide, x, rubbish.reshape((W,) + (1,) * (x.ndim - 4)))


# Independent references: loops over rigs and views, on the valid pixels alone ([P, C] rows), float64.


def rigs_of(student, teacher, mask):
    """Per rig the list of its views with a valid pixel: (student rows, teacher rows)."""
    views = [
        [(student[b, n][mask[b, n]], teacher[b, n][mask[b, n]]) for n in range(mask.shape[1]) if mask[b, n].any()]
        for b in range(mask.shape[0])
    ]
    return [rig for rig in views if rig]


def mean(values):
    return sum(values) / len(values) if values else torch.zeros((), dtype=torch.float64)


def ref_response(s, t, mask):
    out = []
    for rig in rigs_of(s, t, mask):
        errors = []
        for d, r in rig:
            if len(r) < 2 or r.max() == r.min():
                continue
            q = 1 / d
            design = torch.stack([r, torch.ones_like(r)], 1)
            scale, shift = torch.linalg.lstsq(design, q.detach()[:, None]).solution[:, 0]
            if scale < 0:
                scale, shift = 0.0, q.detach().mean()
            errors.append((q - (scale * r + shift)).abs())
        if errors:
            out.append(torch.cat(errors).mean())
    return mean(out)


def ref_fitnets(s, t, mask):
    return mean([torch.cat([((a - b) ** 2).mean(1) for a, b in rig]).mean() for rig in rigs_of(s, t, mask)])


def ref_at(s, t, mask):
    def attention(x):
        return F.normalize(x.pow(2).mean(1), dim=0)

    return mean([torch.cat([(attention(a) - attention(b)) ** 2 for a, b in rig]).mean() for rig in rigs_of(s, t, mask)])


def ref_sp(s, t, mask):
    keep = mask.flatten(2).any(2).flatten()
    if not keep.any():
        return mean([])

    def gram(x):
        x = torch.where(mask[..., None], x, 0.0).flatten(2).flatten(0, 1)[keep]
        return F.normalize(x @ x.T, dim=1)

    return (gram(t) - gram(s)).norm() ** 2 / int(keep.sum()) ** 2


def ref_rkd(s, t, mask):
    views = [view for rig in rigs_of(s, t, mask) for view in rig]
    x, y = ([view[side].mean(0) for view in views] for side in (0, 1))
    pairs = list(itertools.permutations(range(len(views)), 2))
    triplets = list(itertools.permutations(range(len(views)), 3))

    def distances(e):
        d = torch.stack([(e[i] - e[j]).norm() for i, j in pairs])
        return d / d.mean()

    def cosines(e):
        return torch.stack([F.cosine_similarity(e[i] - e[j], e[k] - e[j], dim=0) for i, j, k in triplets])

    loss = mean([])
    if pairs:
        loss = loss + 25 * F.smooth_l1_loss(distances(x), distances(y))
    if triplets:
        loss = loss + 50 * F.smooth_l1_loss(cosines(x), cosines(y))
    return loss


def ref_cwd(s, t, mask):
    tau = OPTIONS["cwd"]["tau"]

    def view(a, b):
        return F.kl_div(F.log_softmax(a / tau, 0), F.softmax(b / tau, 0), reduction="none").sum(0).mean()

    return tau**2 * mean([mean([view(a, b) for a, b in rig]) for rig in rigs_of(s, t, mask)])


def ref_dist(s, t, mask):
    o = OPTIONS["dist"]
    inter, intra = [], []
    for rig in rigs_of(s, t, mask):
        p, q = (F.softmax(torch.cat([view[side] for view in rig]) / o["tau"], 1) for side in (0, 1))
        inter.append(mean([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p, q, strict=True)]))
        if len(p) > 1:
            intra.append(mean([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(p.T, q.T, strict=True)]))
    return o["tau"] ** 2 * (o["beta"] * mean(inter) + o["gamma"] * mean(intra))


def ref_cirkd(s, t, mask):
    tau = OPTIONS["cirkd"]["tau"]
    out = []
    for rig in rigs_of(s, t, mask):
        if sum(len(view[0]) for view in rig) == 1:
            continue  # one token: no relation

        def tokens(side, rig=rig):
            centre = torch.cat([view[side] for view in rig]).mean(0)
            return [F.normalize(view[side] - centre, dim=1) for view in rig]

        x, y = tokens(0), tokens(1)
        rows = [
            F.kl_div(F.log_softmax(x[i] @ x[j].T / tau, 1), F.softmax(y[i] @ y[j].T / tau, 1), reduction="none").sum(1)
            for i in range(len(x))
            for j in range(len(x))
        ]
        out.append(torch.cat(rows).mean())
    return mean(out)


def reference(name, student, teacher, mask):
    """(value, gradient of the student) by PyTorch in float64."""
    s = torch.tensor(student, dtype=torch.float64, requires_grad=True)
    loss = globals()[f"ref_{name}"](s, torch.tensor(teacher, dtype=torch.float64), torch.tensor(mask))
    if loss.requires_grad:
        loss.backward()
    return loss.item(), np.zeros_like(student) if s.grad is None else s.grad.numpy()


def check(name, student, teacher, mask):
    got, (slope_s, slope_t) = value_and_slopes(name)(with_rubbish(student, mask), with_rubbish(teacher, mask), mask)
    expected, slope = reference(name, with_rubbish(student, mask), with_rubbish(teacher, mask), mask)
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    assert not np.any(slope_t)
    slope_s = np.asarray(slope_s)
    assert np.isfinite(slope_s).all() and not slope_s[~mask].any()
    np.testing.assert_allclose(slope_s, slope, rtol=1e-4, atol=1e-5 * max(1e-3, np.abs(slope).max()))
    return float(got)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_agree_with_pytorch_for_any_mask(name, kind):
    student, teacher = case(name)
    got = check(name, student, teacher, make_mask(kind))
    assert (got > 1e-4) == (kind in ("some", "view_out", "rig_out", "all") or (name, kind) in says_of_one_pixel())


def says_of_one_pixel():
    return {("fitnets", "one"), ("dist", "one")}


@pytest.mark.parametrize("n", [1, 4, 6])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_cameras_in_any_order(name, n):
    student, teacher = case(name, n, seed=4)
    mask = make_mask("some", n)
    expected = check(name, student, teacher, mask)
    order = np.random.default_rng(2).permutation(n)
    np.testing.assert_allclose(
        value(name, student[:, order], teacher[:, order], mask[:, order]), expected, rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("constant", ["student", "teacher", "both", "zero"])
@pytest.mark.parametrize("name", NAMES)
def test_constant_inputs_give_finite_values_and_gradients(name, constant):
    student, teacher = case(name)
    if constant in ("student", "both"):
        student = np.full_like(student, 0.3)
    if constant in ("teacher", "both"):
        teacher = np.full_like(teacher, 0.7)
    if constant == "zero":
        student, teacher = (0 * x for x in (student, teacher))
        if name == "response":
            student += 1e-3  # metres, positive
    for kind in MASKS:
        got, slopes = value_and_slopes(name)(student, teacher, make_mask(kind))
        assert np.isfinite(got) and all(np.isfinite(slope).all() for slope in slopes), kind
        assert np.abs(slopes[0]).max() < 1e4, kind  # rounding is not amplified
        if constant == "teacher" and name in ("response", "rkd"):
            assert got == 0, kind  # such a teacher says nothing here


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_to_learn_where_the_student_is_the_teacher(name):
    student, teacher = case(name)
    if name == "response":
        teacher = (3 / student - 0.1).astype(np.float32)
    else:
        student = teacher
    for kind in MASKS:
        assert abs(value(name, student, teacher, make_mask(kind))) < 3e-6, kind


@pytest.mark.parametrize("name", NAMES)
def test_only_the_couplers_couple_the_rigs_of_a_batch(name):
    student, teacher = case(name, seed=5)
    mask = make_mask("some")
    first, second = mask.copy(), mask.copy()
    first[1], second[0] = False, False
    single = [value(name, student, teacher, m) for m in (first, second)]
    coupled = abs(value(name, student, teacher, mask) - np.mean(single)) > 1e-4 * np.mean(single)
    assert coupled == BASELINES[name].couples_batch


def rotation(seed=7):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(C, C)))[0]


INVARIANCES = {
    ("at", "permuted channels"): lambda x: x[..., [3, 0, 5, 1, 4, 2]],
    ("at", "rotated channels"): lambda x: x @ rotation(),
    ("at", "scale of a view"): lambda x: x * np.linspace(0.1, 30, B * N).reshape(B, N, 1, 1, 1),
    ("sp", "rotated channels"): lambda x: x @ rotation(),
    ("sp", "scale"): lambda x: 50 * x,
    ("rkd", "rotated channels"): lambda x: x @ rotation(),
    ("rkd", "scale and shift"): lambda x: 50 * x + np.arange(C),
    ("cirkd", "rotated channels"): lambda x: x @ rotation(),
    ("cirkd", "scale and shift"): lambda x: 50 * x + np.arange(C),
    ("cwd", "constant per channel and view"): lambda x: x + np.arange(B * N * C).reshape(B, N, 1, 1, C),
    ("response", "affine map of the view"): lambda x: x * np.linspace(0.1, 90, B * N).reshape(B, N, 1, 1) - 2,
}


@pytest.mark.parametrize(("name", "change"), INVARIANCES)
def test_what_a_baseline_does_not_see(name, change):
    student, teacher = case(name, seed=8)
    mask = make_mask("view_out")
    expected = value(name, student, teacher, mask)
    changed = INVARIANCES[name, change](teacher.astype(np.float64)).astype(np.float32)
    assert expected > 1e-4
    np.testing.assert_allclose(value(name, student, changed, mask), expected, rtol=2e-5)
    if name != "response":
        changed = INVARIANCES[name, change](student.astype(np.float64)).astype(np.float32)
        np.testing.assert_allclose(value(name, changed, teacher, mask), expected, rtol=2e-5)


def test_dist_does_not_see_affine_maps_of_distributions():
    student, teacher = case("dist", seed=9)
    mask = make_mask("some")
    p = np.asarray(jax.nn.softmax(student.astype(np.float64), -1))
    rng = np.random.default_rng(0)
    dist = jax.jit(baselines.dist, static_argnames=("beta", "gamma"))
    for share, weights in ((rng.uniform(0.2, 1, (B, N, H, W, 1)), {"gamma": 0.0}), (0.4, {})):
        mapped = np.log(share * p + (1 - share) / K).astype(np.float32)  # a distribution again
        expected = float(dist(student, teacher, mask, **weights))
        assert expected > 0.01
        np.testing.assert_allclose(dist(mapped, teacher, mask, **weights), expected, rtol=2e-5)
    x, y = (rng.random((5, 40)).astype(np.float32) for _ in range(2))
    slopes, shifts = rng.uniform(0.1, 1, (5, 1)), rng.normal(size=(5, 1))
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    rho, known = baselines.correlation(x, (slopes * y + shifts).astype(np.float32), np.ones_like(x, bool), -1)
    np.testing.assert_allclose(rho, expected, rtol=1e-4, atol=1e-5)
    assert known.all()


def test_dist_leaves_out_bins_that_the_teacher_does_not_use():
    student, teacher = case("dist", seed=10)
    mask = make_mask("all")
    teacher[..., 4:] = -40.0
    p_s, p_t = (torch.softmax(torch.tensor(x, dtype=torch.float64), -1).reshape(B, -1, K) for x in (student, teacher))
    rho = [[torch.corrcoef(torch.stack([p_s[b, :, k], p_t[b, :, k]]))[0, 1] for k in range(4)] for b in range(B)]
    np.testing.assert_allclose(baselines.dist(student, teacher, mask, beta=0.0), 1 - np.mean(rho), rtol=1e-5)


def test_attention_leaves_out_views_where_the_teacher_is_zero():
    student, teacher = case("at", seed=14)
    teacher[0, 1] = 0.0
    mask = make_mask("some")
    without = mask.copy()
    without[0, 1] = False
    np.testing.assert_allclose(value("at", student, teacher, mask), value("at", student, teacher, without), rtol=1e-6)


def test_response_leaves_the_target_alone():
    """The gradient is that of a fixed target, with the sign of the difference over d^2."""
    student, teacher = case("response", seed=11)
    mask = make_mask("some")
    _, (slope, _) = value_and_slopes("response")(student, teacher, mask)
    rig = np.broadcast_to(mask.sum((1, 2, 3), keepdims=True), mask.shape)
    np.testing.assert_allclose(np.abs(slope)[mask], (1 / student**2 / rig / B)[mask], rtol=1e-4)


def test_cirkd_without_removing_the_mean():
    student, teacher = case("cirkd", seed=12)
    got = baseline_relations.cross_view(student, teacher, make_mask("all"), grid=None, remove_mean=False)
    expected = []
    for b in range(B):
        x, y = (
            F.normalize(torch.tensor(v[b], dtype=torch.float64).reshape(N, -1, C), dim=2) for v in (student, teacher)
        )
        for i, j in itertools.product(range(N), repeat=2):
            log_s, log_t = ((v[i] @ v[j].T / 0.1).log_softmax(1) for v in (x, y))
            expected.append((log_t.exp() * (log_t - log_s)).sum(1).mean().item())
    np.testing.assert_allclose(got, np.mean(expected), rtol=1e-5)


def test_common_grid():
    rng = np.random.default_rng(3)
    student, teacher = rng.normal(size=(B, N, H, W, 2)), rng.normal(size=(B, N, 2 * H, 2 * W, 3))
    mask = np.ones((B, N, 2 * H, 2 * W), bool)
    mask[0, 0, 0, :3] = False
    mask[0, 0, 1, 2] = False  # cell (0, 0) half masked, cell (0, 1) half masked
    mask[0, 0, 2:4, :2] = [[False, False], [False, True]]  # cell (1, 0) three quarters masked
    mask[1, 2] = False
    s, t, valid = masked.common_grid(student.astype(np.float32), jnp.asarray(teacher, jnp.bfloat16), mask)
    assert s.dtype == t.dtype == jnp.float32
    expected = np.ones((B, N, H, W), bool)
    expected[0, 0, 1, 0], expected[1, 2] = False, False
    np.testing.assert_array_equal(valid, expected)
    blocks = np.asarray(jnp.asarray(teacher, jnp.bfloat16), np.float64).reshape(B, N, H, 2, W, 2, 3).mean((3, 5))
    np.testing.assert_allclose(t, blocks * expected[..., None], atol=1e-6)
    np.testing.assert_allclose(s, student * expected[..., None], atol=1e-6)
    # the smaller of the two per axis; bilinear where a given grid is larger
    assert masked.common_grid(s, t[:, :, :2, :, :], expected)[0].shape == (B, N, 2, W, 2)
    up = masked.resize_features(s, 7, 9)
    folded = torch.tensor(np.asarray(s)).reshape(B * N, H, W, 2).permute(0, 3, 1, 2)
    torch_up = F.interpolate(folded, size=(7, 9), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    np.testing.assert_allclose(up.reshape(B * N, 7, 9, 2), torch_up.numpy(), atol=1e-6)


@pytest.mark.parametrize("name", FEATURES)
def test_features_of_other_sizes_meet_on_a_common_grid(name):
    rng = np.random.default_rng(6)
    student, teacher = case(name, seed=6)
    fine = np.repeat(np.repeat(teacher, 2, 2), 2, 3)
    noise = rng.normal(size=(B, N, H, 1, W, 2, C))  # cancels within a cell
    fine += np.concatenate([noise, -noise], 3).reshape(fine.shape).astype(np.float32)
    channels = slice(None) if BASELINES[name].projector else slice(0, 4)  # channel counts may differ without one
    mask = make_mask("view_out")
    got = value(name, student[..., channels], fine, mask)
    np.testing.assert_allclose(got, reference(name, student[..., channels], teacher, mask)[0], rtol=2e-5)


def test_response_resizes_the_teacher():
    student, teacher = case("response", seed=13)
    fine = np.repeat(np.repeat(teacher, 2, 2), 3, 3)
    got = baselines.response(student, fine, make_mask("some"))
    np.testing.assert_allclose(got, reference("response", student, teacher, make_mask("some"))[0], rtol=1e-5)


def test_projector_is_a_1x1_convolution_that_learns():
    student, teacher = case("fitnets")
    student = student[..., :4]
    module = Projector(C)
    params = module.init(jax.random.key(0), student)["params"]
    shapes = {jax.tree_util.keystr(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert shapes == {"['conv']['kernel']": (4, C), "['conv']['bias']": (C,)}
    params["conv"]["bias"] = jnp.arange(C, dtype=jnp.float32)
    out = module.apply({"params": params}, jnp.asarray(student, jnp.bfloat16))
    assert out.dtype == jnp.float32
    weights = torch.tensor(np.array(params["conv"]["kernel"])).T[:, :, None, None]
    images = torch.tensor(student).reshape(B * N, H, W, 4).permute(0, 3, 1, 2)
    expected = F.conv2d(images, weights, torch.arange(C, dtype=torch.float32)).permute(0, 2, 3, 1).reshape(out.shape)
    np.testing.assert_allclose(out, expected, atol=0.05)  # bfloat16 went in
    np.testing.assert_allclose(module.apply({"params": params}, student), expected, atol=1e-5)
    mask = make_mask("some")

    @jax.jit
    def step(params):
        loss, slopes = jax.value_and_grad(
            lambda p: baselines.fitnets(module.apply({"params": p}, student), teacher, mask)
        )(params)
        return loss, jax.tree.map(lambda p, g: p - 0.5 * g, params, slopes)

    first, params = step(params)
    for _ in range(20):
        last, params = step(params)
    assert last < 0.5 * first


def test_table_and_unknown_names():
    assert {name for name, entry in BASELINES.items() if entry.projector} == {"fitnets", "cwd"}
    assert {name for name, entry in BASELINES.items() if entry.couples_batch} == {"sp", "rkd"}
    assert baseline("at") is BASELINES["at"]
    with pytest.raises(
        ConfigError, match=r"distill\.baseline: unknown name 'fitnet'; did you mean 'fitnets'\? There are: resp"
    ):
        baseline("fitnet")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_that_do_not_fit_are_refused(name):
    student, teacher = case(name)
    with pytest.raises(ValueError, match="expected"):
        BASELINES[name].loss(student, teacher, np.ones((B, N + 1, H, W), bool))
    if BASELINES[name].projector:
        with pytest.raises(ValueError, match=r"channels.*Projector"):
            BASELINES[name].loss(student[..., :3], teacher, make_mask("all"))
