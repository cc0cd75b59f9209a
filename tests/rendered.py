"""Small rendered data in every input format: nuScenes and DGP dataroots, a folder rig. Geometry: tests.boxes."""

import csv
import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from pyquaternion import Quaternion

from tests import boxes

SMALL = (45, 80)  # image height and width
RIG_OF_3 = {name: boxes.NUSCENES_CAMERAS[name] for name in ("CAM_FRONT", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")}
DGP_START = "2019-05-01T10:00:"

# The converter, with a pause in every sample so that there is time to kill it half-way.
SLOW_CONVERTER = """
import time
from data_prep import nuscenes, shard
build = shard.build_sample
def slow(*arguments):
    time.sleep(0.1)
    return build(*arguments)
shard.build_sample = slow
if __name__ == "__main__":
    nuscenes.main()
"""


def nuscenes(out: Path, frames=(3, 2), size=SMALL, cameras=None, beams=16, columns=180) -> Path:
    """A nuScenes dataroot, tiny and quick."""
    boxes.write_nuscenes(out, frames, size, cameras, beams, columns)
    return out


def _pose(matrix: np.ndarray) -> dict:
    q = Quaternion(matrix=matrix, atol=1e-6)
    return {
        "rotation": {"qw": q.w, "qx": q.x, "qy": q.y, "qz": q.z},
        "translation": dict(zip("xyz", matrix[:3, 3].tolist(), strict=True)),
    }


def dgp(out: Path, scenes=(("000000", "0"), ("000150", "1")), frames=3, size=SMALL, masks=True) -> Path:
    """A DGP dataset with one file of each kind per sensor; returns its json. PNG images, LiDAR in the vehicle frame."""
    cameras = {f"CAMERA_{i:02d}": spec for i, spec in zip((1, 5, 7), RIG_OF_3.values(), strict=True)}
    splits: dict[str, dict] = {k: {"filenames": []} for k in ("0", "1")}
    for seed, (scene, split) in enumerate(scenes):
        street = boxes.make_street(seed)
        folder = out / scene
        names = ["LIDAR", *cameras]
        poses = {"LIDAR": np.eye(4), **{n: boxes.camera_pose(c[0], c[2]) for n, c in cameras.items()}}
        ks = {n: boxes.intrinsics(c[1], size) for n, c in cameras.items()}
        calibration = {
            "names": names,
            "extrinsics": [_pose(poses[n]) for n in names],
            "intrinsics": [
                {"fx": ks[n][0, 0], "fy": ks[n][1, 1], "cx": ks[n][0, 2], "cy": ks[n][1, 2], "skew": 0.0}
                if n in ks
                else {"fx": 0.0, "fy": 0.0, "cx": 0.0, "cy": 0.0, "skew": 0.0}
                for n in names
            ],
        }
        (folder / "calibration").mkdir(parents=True)
        (folder / "calibration" / "c0.json").write_text(json.dumps(calibration))
        data, samples = [], []
        lift = np.eye(4)
        lift[2, 3] = 1.84  # rays start at the sensor, points are stored in the vehicle frame
        for i in range(frames):
            keys = []
            for name in names:
                at = i * 100_000 + (0 if name == "LIDAR" else cameras[name][3])
                stamp = f"{DGP_START}{(10_000_000 + at) / 1e6:09.6f}Z"
                pose = boxes.ego_pose(at) @ poses[name]
                key = f"{scene}-{i}-{name}"
                keys.append(key)
                if name == "LIDAR":
                    path = folder / "point_cloud" / name / f"{at}.npz"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    points = boxes.sweep(street, pose @ lift, 16, 180) + lift[:3, 3]
                    np.savez(path, data=np.concatenate([points, np.zeros((len(points), 1))], 1))
                    datum = {"point_cloud": {"filename": str(path.relative_to(folder)), "pose": _pose(pose)}}
                else:
                    path = folder / "rgb" / name / f"{at}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(boxes.render(street, pose, ks[name], size)[0]).save(path)
                    content = {"filename": str(path.relative_to(folder)), "pose": _pose(pose)}
                    datum = {"image": {**content, "height": size[0], "width": size[1], "channels": 3}}
                data.append({"key": key, "datum": datum, "id": {"name": name, "timestamp": stamp, "index": str(i)}})
            samples.append({"datum_keys": keys, "calibration_key": "c0", "id": {"index": str(i)}})
        scene_file = folder / "scene_0.json"
        scene_file.write_text(json.dumps({"name": "", "data": data, "samples": samples}))
        splits[split]["filenames"].append(f"{scene}/scene_0.json")
    (out / "ddad.json").write_text(json.dumps({"metadata": {"name": "boxes", "version": "1"}, "scene_splits": splits}))
    if masks:
        (out / "masks" / "0").mkdir(parents=True)
        for n, name in enumerate(cameras):
            mask = np.full(size, 255, np.uint8)
            mask[size[0] - 6 * n :] = 0
            Image.fromarray(mask).save(out / "masks" / "0" / f"{name}_mask.png")
    return out / "ddad.json"


def write_ply(path: Path, points: np.ndarray, binary: bool = True) -> None:
    """PLY with an intensity between, and a face element after, the coordinates."""
    head = (
        f"ply\nformat {'binary_little_endian' if binary else 'ascii'} 1.0\ncomment test\nelement vertex {len(points)}\n"
    )
    head += "property double x\nproperty double y\nproperty uchar intensity\nproperty double z\n"
    head += "element face 0\nproperty list uchar int vertex_indices\nend_header\n"
    dtype = np.dtype([("x", "<f8"), ("y", "<f8"), ("i", "u1"), ("z", "<f8")])
    table = np.zeros(len(points), dtype)
    table["x"], table["y"], table["z"], table["i"] = points[:, 0], points[:, 1], points[:, 2], 7
    body = table.tobytes() if binary else "".join(f"{r[0]!r} {r[1]!r} 7 {r[2]!r}\n" for r in points.tolist()).encode()
    path.write_bytes(head.encode() + body)


def write_pcd(path: Path, points: np.ndarray, form: str = "binary") -> None:
    """PCD v0.7 with float64 coordinates and a 16-bit ring."""
    head = "# .PCD v0.7\nVERSION 0.7\nFIELDS x y z ring\nSIZE 8 8 8 2\nTYPE F F F U\nCOUNT 1 1 1 1\n"
    head += f"WIDTH {len(points)}\nHEIGHT 1\nVIEWPOINT 0 0 0 1 0 0 0\nPOINTS {len(points)}\nDATA {form}\n"
    table = np.zeros(len(points), np.dtype([("x", "<f8"), ("y", "<f8"), ("z", "<f8"), ("r", "<u2")]))
    table["x"], table["y"], table["z"] = points.T
    body = (
        table.tobytes()
        if form == "binary"
        else "".join(f"{r[0]!r} {r[1]!r} {r[2]!r} 3\n" for r in points.tolist()).encode()
    )
    path.write_bytes(head.encode() + body)


def folder_of(plans, out: Path, cloud_suffix: str = ".ply") -> dict[str, Path]:
    """Writes sample plans of a converter as a folder rig: rig.yaml, images/, lidar/, poses.csv. Returns their paths."""
    from data_prep.pointfiles import read_points

    rows, first = [], plans[0]

    def row(sensor: str, time: int, pose: np.ndarray) -> dict:
        q = Quaternion(matrix=pose, atol=1e-6)
        values = {"qw": q.w, "qx": q.x, "qy": q.y, "qz": q.z, **dict(zip("xyz", pose[:3, 3], strict=True))}
        return {"sensor": sensor, "timestamp_us": time, **{k: repr(float(v)) for k, v in values.items()}}

    (out / "lidar").mkdir(parents=True)
    for plan in plans:
        points = read_points(plan.sweep.path, plan.sweep.bin_columns)
        path = out / "lidar" / f"{plan.timestamp_us}{cloud_suffix}"
        if cloud_suffix == ".ply":
            write_ply(path, points)
        elif cloud_suffix == ".pcd":
            write_pcd(path, points)
        else:
            np.save(path, points)
        rows.append(row("lidar", plan.timestamp_us, plan.sweep.sensor_to_global))
        for camera in plan.cameras:
            target = out / "images" / camera.name / f"{camera.timestamp_us}{Path(camera.image).suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(Path(camera.image).read_bytes())
            rows.append(row(camera.name, camera.timestamp_us, camera.ego_to_global))
    rig = {
        "name": "exported",
        "match": "nearest",
        "tolerance_ms": 100,
        "max_depth": 200,
        "point_rule": "truncate",
        "cameras": {
            c.name: {
                "image_size": list(c.native_size),
                "intrinsics": c.intrinsics.tolist(),
                "cam_to_ego": c.cam_to_ego.tolist(),
                "distortion": [0.0, 0.0, 0.0, 0.0, 0.0],
            }
            for c in first.cameras
        },
    }
    (out / "rig.yaml").write_text(yaml.safe_dump(rig))
    with open(out / "poses.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return {"rig_path": out / "rig.yaml", "images": out / "images", "lidar": out / "lidar", "poses": out / "poses.csv"}
