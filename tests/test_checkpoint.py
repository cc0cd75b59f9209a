"""Checkpoints: exact round trips, what may change on resume, and clear refusals."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import google_crc32c
import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import checkpoint, checksums, compatible
from fsmde_jax.errors import ConfigError, TrainingError
from fsmde_jax.run_checkpoints import Checkpoints
from fsmde_jax.state import TrainState


def failing(script, workdir):
    """Runs a script that has to end with an error."""
    command = [sys.executable, str(script), str(workdir)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1, result.stderr[-2000:]
    return result


def make_state(step, value):
    params = {"encoder": {"w": jnp.full((3, 2), value)}, "head": {"b": jnp.arange(4.0) + value}}
    stats = {"encoder": {"mean": jnp.full((2,), -value)}}
    return TrainState(jnp.int32(step), params, stats, {"mu": jax.tree.map(lambda p: p * 0.5, params)})


def make_iterator():
    return iter(grain.MapDataset.source(np.arange(100)).shuffle(seed=3).to_iter_dataset())


META = {"identity": {"config": {"seed": 0}}, "best": None}


def test_round_trip_of_state_iterator_and_meta(tmp_path):
    iterator = make_iterator()
    first = [int(next(iterator)) for _ in range(7)]
    state = make_state(7, 1.5)
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(state, iterator, META)
        checkpoints.wait()
        following = [int(next(iterator)) for _ in range(5)]
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_step == 7
        restored, resumed, meta = checkpoints.restore(make_state(0, 0.0), make_iterator())
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert meta == META
    assert [int(next(resumed)) for _ in range(5)] == following
    assert not set(first) & set(following)


def test_keeps_the_newest_and_the_best(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step, float(step)), make_iterator(), META)
            if step < 3:
                checkpoints.save_best(make_state(step, float(step)), {**META, "best": {"step": step}})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    tree, meta, step = checkpoint.read_parameters(tmp_path, "best")
    assert (step, meta["best"]["step"]) == (2, 2)
    np.testing.assert_array_equal(tree["params"]["encoder"]["w"], np.full((3, 2), 2.0))
    tree, _, step = checkpoint.read_parameters(tmp_path, "latest")
    assert step == 3
    np.testing.assert_array_equal(tree["batch_stats"]["encoder"]["mean"], np.full((2,), -3.0))


def test_missing_checkpoint_says_what_to_do(tmp_path):
    with pytest.raises(TrainingError, match=r"no best checkpoint.*--mode train.*eval.checkpoint=latest"):
        checkpoint.read_parameters(tmp_path, "best")


def test_config_changes_that_make_another_network_are_refused():
    saved = {
        "seed": 0,
        "model": {"encoder": "resnet18", "num_bins": 64},
        "data": {"image_size": [352, 640]},
        "optim": {"lr": 1},
    }
    harmless = {**saved, "optim": {"lr": 2}, "data": {"image_size": (352, 640)}}
    compatible.check_config(saved, harmless, "here")
    compatible.check_config(saved, {**harmless, "task": "student"}, "here")  # runs of older versions have no task
    changed = {**saved, "model": {"encoder": "resnet34", "num_bins": 64}, "seed": 1}
    with pytest.raises(ConfigError) as error:
        compatible.check_config(saved, changed, "here")
    assert "model.encoder: checkpoint has 'resnet18', config has 'resnet34'" in str(error.value)
    assert "seed: checkpoint has 0, config has 1" in str(error.value)
    assert "num_bins" not in str(error.value)
    # What a teacher would say matters only where one is in use.
    idle = {"w_ckd": 0.0, "w_vr": 0.0, "baseline": ""}
    old, new = ({**saved, "distill": {**idle, "bins": name}} for name in ("soft_assign", "aligned"))
    compatible.check_config(old, new, "here")
    old, new = ({**config, "distill": {**config["distill"], "w_ckd": 1.0}} for config in (old, new))
    with pytest.raises(ConfigError, match=r"distill.bins: checkpoint has 'soft_assign', config has 'aligned'"):
        compatible.check_config(old, new, "here")
    # A key that came later means what was done before.
    compatible.check_config(old, {**old, "distill": {**old["distill"], "shift": "auto"}}, "here")
    with pytest.raises(ConfigError, match=r"distill.shift: checkpoint has 'auto', config has 'unknown'"):
        compatible.check_config(old, {**old, "distill": {**old["distill"], "shift": "unknown"}}, "here")


def test_parameters_of_another_model_are_refused_with_every_difference():
    template = make_state(0, 0.0).params
    source = {"encoder": {"w": np.zeros((3, 3))}, "other": {"b": np.zeros(4)}}
    with pytest.raises(TrainingError) as error:
        compatible.fit_parameters(template, source, "runs/x")
    for text in ("runs/x", "missing ['head']['b']", "not expected ['other']['b']", "(3, 3) instead of (3, 2)"):
        assert text in str(error.value)


def test_unwritable_folder_is_a_clear_error(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(TrainingError, match="file"):
        Checkpoints(blocked / "run", keep=1)


def test_json_is_written_by_rename(tmp_path):
    checkpoint.dump_json(tmp_path / "config.json", {"a": (1, 2)})
    assert json.loads((tmp_path / "config.json").read_text()) == {"a": [1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_best_checkpoints_of_an_abandoned_trajectory_are_forgotten(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save_best(make_state(10, 1.0), META)
        checkpoints.wait()
        checkpoints.forget_best_after(6)
        assert checkpoints.best_steps == []
        checkpoints.save_best(make_state(7, 2.0), META)
    tree, _, step = checkpoint.read_parameters(tmp_path, "best")
    assert step == 7
    np.testing.assert_array_equal(tree["params"]["encoder"]["w"], np.full((3, 2), 2.0))
    with pytest.raises(TrainingError, match="not after"), Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save_best(make_state(7, 3.0), META)


def test_damaged_checkpoint_is_named_with_what_to_do(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        checkpoints.save(make_state(3, 1.0), make_iterator(), META)
    for path in (tmp_path / "checkpoints" / "3" / "model").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        Checkpoints(tmp_path, keep=2) as checkpoints,
        pytest.raises(TrainingError, match=r"checkpoints/3: damaged.*delete"),
    ):
        checkpoints.restore(make_state(0, 0.0), make_iterator())
    with pytest.raises(TrainingError, match=r"checkpoints/3: damaged.*delete"):
        checkpoint.read_parameters(tmp_path, "latest")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (3, 5, 7):
            checkpoints.save(make_state(step, float(step)), make_iterator(), META)
    (tmp_path / "checkpoints" / "7" / "meta" / "metadata").write_text('{"identity": ')
    for path in (tmp_path / "checkpoints" / "5" / "training").rglob("*"):
        if path.is_file():
            path.unlink()
    shutil.copytree(tmp_path / "checkpoints" / "3", tmp_path / "checkpoints" / "9.orbax-checkpoint-tmp-1")  # unfinished
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        state, _, meta = checkpoints.restore(make_state(0, 0.0), make_iterator())
        assert int(state.step) == 3 and meta == META
        checkpoints.save(make_state(5, 5.5), make_iterator(), META)  # the number is free again
    said = capsys.readouterr().err
    assert said.count("damaged checkpoint") == 2 and "going on from step 3 instead of 5" in said
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["5", "7"]
    np.testing.assert_array_equal(
        checkpoint.read_parameters(tmp_path, "latest")[0]["params"]["encoder"]["w"], np.full((3, 2), 5.5)
    )


@pytest.mark.parametrize("how", ["cut", "gone", "one bit"])
def test_one_damaged_file_of_numbers_is_enough(tmp_path, how, capsys):
    """The largest data file alone: orbax raises a bare Exception there, and notices no flipped bit."""
    big = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)

    def state(step):
        return dataclasses.replace(make_state(step, float(step)), params={"w": jnp.asarray(big) * step})

    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (3, 5):
            checkpoints.save(state(step), make_iterator(), META)
    files = [p for p in (tmp_path / "checkpoints" / "5" / "model").rglob("*") if p.is_file() and "/d/" in str(p)]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.unlink() if how == "gone" else largest.write_bytes(content if how == "one bit" else content[:1000])
    with pytest.raises(TrainingError, match="numbers of its model are not those" if how == "one bit" else "damaged"):
        checkpoint.read_parameters(tmp_path, "latest")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        restored, _, _ = checkpoints.restore(state(0), make_iterator())
    assert int(restored.step) == 3 and "checkpoints/5: damaged" in capsys.readouterr().err
    np.testing.assert_array_equal(restored.params["w"], big * 3)


def test_checksums_see_names_types_shapes_and_values():
    array = np.arange(6, dtype=np.float32)
    found = [
        checksums.checksums({"x": tree})["x"]
        for tree in (
            {"a": array}, {"b": array}, {"a": array.reshape(2, 3)}, {"a": array.view(np.int32)}, {"a": array + 1},
            {"a": array, "b": array[:0]},
        )
    ]  # fmt: skip
    assert len(set(found)) == len(found)
    assert checksums.checksums({"x": {"a": jnp.asarray(array)}}) == {"x": found[0]}
    assert found[0] == google_crc32c.value(b"['a'] float32 (6,)" + array.tobytes())


@pytest.mark.parametrize("item", ["data", "meta"])
def test_a_digit_that_is_another_one_is_noticed(tmp_path, item, capsys):
    """The position of the data, or the count of skipped steps: as JSON it is as good as the right one."""
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (3, 5):
            iterator = make_iterator()
            for _ in range(step):
                next(iterator)
            checkpoints.save(make_state(step, float(step)), iterator, {**META, "next_index": 5})
    path = tmp_path / "checkpoints" / "5" / item / "metadata"
    text = path.read_text()
    assert text.count('"next_index": 5') == 1
    path.write_text(text.replace('"next_index": 5', '"next_index": 4'))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert int(checkpoints.restore(make_state(0, 0.0), make_iterator())[0].step) == 3
    assert f"checkpoints/5: damaged checkpoint (its {item} is not what was written" in capsys.readouterr().err


def test_checksums_of_json_see_values_and_not_their_order():
    value = {"a": [1, 2.5, None, (3, 4)], "b": {"c": "x", "d": 0.1}}
    again = json.loads(json.dumps({"b": {"d": 0.1, "c": "x"}, "a": [1, 2.5, None, [3, 4]]}))
    assert checksums.of_json(value) == checksums.of_json(again)
    assert checksums.of_json(value) != checksums.of_json({**value, "a": [1, 2.5, None, (3, 5)]})
    assert checksums.of_json({"a": 1}) == google_crc32c.value(b'{"a": 1}')


def test_of_best_checkpoints_stay_the_newest_and_those_that_a_kept_checkpoint_goes_on_from(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in range(1, 10):
            if step in (3, 6):
                checkpoints.save(make_state(step, 1.0), make_iterator(), META)
            if step in (1, 2, 4, 5, 7, 8):
                checkpoints.save_best(make_state(step, 1.0), {**META, "best": {"step": step}})
        assert checkpoints.best_meta()["best"] == {"step": 8}
        checkpoints.tidy_best()
        assert checkpoints.best_steps == [2, 5, 8]
        checkpoints.forget_best_after(6)
        assert checkpoints.best_meta()["best"] == {"step": 5}


def test_a_failed_write_is_said_and_the_next_state_is_waited_for(tmp_path):
    """In a process of its own, where the kernel refuses large files for a while; then every write fails."""
    script = tmp_path / "script.py"
    script.write_text(
        "import resource, signal, sys, time\n"
        "from pathlib import Path\n"
        "import numpy as np, jax.numpy as jnp\n"
        "from fsmde_jax.run_checkpoints import Checkpoints\n"
        "from fsmde_jax.errors import exit_with_message\n"
        "from tests.test_checkpoint import META, make_iterator, make_state\n"
        "def limit(size):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
        "def save(step):\n"
        "    checkpoints.save(make_state(step, 1.0).replace(opt_state={'mu': noise}), make_iterator(), META)\n"
        "noise = jnp.asarray(np.random.default_rng(0).normal(size=200_000))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "with exit_with_message(), Checkpoints(Path(sys.argv[1]), keep=1) as checkpoints:\n"
        "    save(1)\n"
        "    checkpoints.wait()\n"
        "    limit(20_000)\n"
        "    save(2)\n"
        "    while not checkpoints.failed():\n"
        "        time.sleep(0.01)\n"
        "    limit(resource.RLIM_INFINITY)\n"
        "    save(3)\n"
        "    print(checkpoints.failed(), [p.name for p in (Path(sys.argv[1]) / 'checkpoints').iterdir()])\n"
        "    limit(20_000)\n"
        "    save(4)\n"
        "    save(5)\n"
        "    print('not reached')\n"
    )
    result = failing(script, tmp_path / "run")
    assert result.stdout.startswith("False ['") and "'3'" in result.stdout and "not reached" not in result.stdout
    assert result.stderr.count("warning: ") == 2 and result.stderr.count("\nerror: ") == 1
    with Checkpoints(tmp_path / "run", keep=1) as checkpoints:
        assert checkpoints.latest_step == 3


def test_a_checkpoint_from_before_there_were_checksums_is_read(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(make_state(3, 3.0), make_iterator(), META)
    path = tmp_path / "checkpoints" / "3" / "meta" / "metadata"
    content = json.loads(path.read_text())
    assert set(content.pop(checkpoint.CHECKSUMS)) == {"model", "training", "data", "meta"}
    path.write_text(json.dumps(content))
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert int(checkpoints.restore(make_state(0, 0.0), make_iterator())[0].step) == 3


def test_a_checkpoint_of_an_older_version_says_what_to_do(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(make_state(3, 3.0), make_iterator(), META)
    data = tmp_path / "checkpoints" / "3" / "data"
    (data / "metadata").rename(data / "process_0-of-1.json")
    with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(ConfigError, match=r"older version.*--init_from"):
        checkpoints.restore(make_state(0, 0.0), make_iterator())


def test_nothing_is_moved_where_no_checkpoint_is_whole(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (3, 5):
            checkpoints.save(make_state(step, float(step)), make_iterator(), META)
    for step in (3, 5):
        (tmp_path / "checkpoints" / str(step) / "meta" / "metadata").write_text("")
    with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(TrainingError, match=r"all 2 .*damaged.*/5"):
        checkpoints.restore(make_state(0, 0.0), make_iterator())
    assert not (tmp_path / "damaged").exists()


def test_full_disk_is_a_clear_error_and_keeps_the_earlier_checkpoint(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse a large file as a full disk does; in a process of its own."""
    script = tmp_path / "script.py"
    script.write_text(
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "import numpy as np, jax.numpy as jnp\n"
        "from fsmde_jax.run_checkpoints import Checkpoints\n"
        "from fsmde_jax.errors import exit_with_message\n"
        "from tests.test_checkpoint import META, make_iterator, make_state\n"
        "import dataclasses\n"
        "with exit_with_message(), Checkpoints(Path(sys.argv[1]), keep=3) as checkpoints:\n"
        "    checkpoints.save(make_state(1, 1.0), make_iterator(), META)\n"
        "    checkpoints.wait()\n"
        "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    noise = jnp.asarray(np.random.default_rng(0).normal(size=200_000))\n"
        "    big = dataclasses.replace(make_state(2, 2.0), opt_state={'mu': noise})\n"
        "    checkpoints.save(big, make_iterator(), META)\n"
        "    checkpoints.wait()\n"
    )
    result = failing(script, tmp_path / "run")
    assert "cannot write a checkpoint" in result.stderr and "Free space" in result.stderr
    with Checkpoints(tmp_path / "run", keep=3) as checkpoints:
        assert checkpoints.latest_step == 1


def test_runs_from_before_the_choice_took_the_mean_of_depth():
    old, new = {"model": {"num_bins": 8}}, {"model": {"num_bins": 8, "expectation": "depth"}}
    compatible.check_config(old, new, "here")
    with pytest.raises(ConfigError, match=r"model.expectation: checkpoint has 'depth', config has 'log'"):
        compatible.check_config(old, {"model": {"num_bins": 8, "expectation": "log"}}, "here")
    assert old == {"model": {"num_bins": 8}}
