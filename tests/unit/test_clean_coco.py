"""tools/clean_coco.py: its files are accepted, and COCO counts them like those repaired by hand."""

import contextlib
import copy
import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_annotations import HEIGHT, WIDTH, coco

from detectron2_nats import NATSError
from detectron2_nats.data.annotations import Needs, read_annotations

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "clean_coco.py"
_spec = importlib.util.spec_from_file_location("clean_coco", SCRIPT)
clean_coco = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(clean_coco)


@pytest.fixture
def cleaned(tmp_path, capsys):
    """(content, options) → the content that it writes, and what it prints."""

    def cleaned(content, *options):
        (tmp_path / "in.json").write_text(json.dumps(content))
        (tmp_path / "out.json").unlink(missing_ok=True)
        try:
            clean_coco.main([str(tmp_path / "in.json"), str(tmp_path / "out.json"), *options])
        except SystemExit as exit:
            assert exit.code == 2 and not (tmp_path / "out.json").exists()
            assert sorted(path.suffix for path in tmp_path.iterdir()).count(".json") == 1
            return None, capsys.readouterr().err
        masks = "any" if "--masks" in options else ""
        read_annotations(str(tmp_path / "out.json"), Needs(masks, to_train=True))
        return json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out

    return cleaned


# -- damaged in random ways ------------------------------------------------------------------------


def scene(rng):
    """A good file, and a detector's detections on it."""
    content, detections = coco(8, annotations=[]), []
    for image in content["images"]:
        for _ in range(rng.integers(2, 5)):
            w, h = rng.integers(4, 20, 2).tolist()
            box = [int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h)), w, h]
            label = {"image_id": image["id"], "category_id": int(rng.choice([3, 7]))}
            number = len(content["annotations"]) + 1
            more = {"id": number, "area": w * h, "iscrowd": 0}
            content["annotations"].append({**label, "bbox": box, **more})
            if rng.random() < 0.9:
                near = (np.array(box) + rng.uniform(-1, 1, 4)).tolist()
                detections.append({**label, "bbox": near, "score": float(rng.random())})
    return content, detections


def numbers(content, detections):
    """The twelve numbers of COCO's evaluation."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(content)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def change(**values):
    """Damage that leaves no doubt what was there."""
    return lambda annotation, right: annotation.update(values)


def leaves_image(annotation, right):
    x, y, w, h = right["bbox"]
    annotation["bbox"] = [x, -5, w, h + y + 5]
    right.update(bbox=[x, 0, w, h + y])


def unusable(key, value):
    def damage(annotation, right):
        annotation[key] = value
        right.clear()

    return damage


SINGLE = [
    change(iscrowd=None),
    change(area=None),
    change(area=-1),
    change(id=0),
    change(id="n7"),
    change(id=3),
    leaves_image,
    unusable("bbox", [1, 2, 0, 9]),
    unusable("bbox", [1, 2, 9]),
    unusable("bbox", [0.1, 0.2, 0.3, 0.4]),
    unusable("bbox", [900, 2, 9, 9]),
    unusable("category_id", 4),
    unusable("image_id", "4"),
    unusable("iscrowd", "no"),
]


@pytest.mark.parametrize("seed", range(30))
def test_coco_counts_the_clean_file_like_one_repaired_by_hand(cleaned, seed):
    rng = np.random.default_rng(seed)
    right, detections = scene(rng)
    damaged = copy.deepcopy(right)
    for key in ("iscrowd", "area", "id"):  # that many exporters do not write at all
        if rng.random() < 0.2:
            for annotation in damaged["annotations"]:
                del annotation[key]
    places = rng.choice(len(damaged["annotations"]), size=rng.integers(1, 4), replace=False)
    for place in places:
        SINGLE[rng.integers(len(SINGLE))](
            damaged["annotations"][place], right["annotations"][place]
        )
    if rng.random() < 0.5:
        damaged["images"] = rng.permutation(damaged["images"]).tolist()
    right["annotations"] = [annotation for annotation in right["annotations"] if annotation]
    content, said = cleaned(damaged, "--boxes", "xywh")  # these few are boxes all the same
    assert content, said
    assert numbers(content, detections) == numbers(right, detections)
    kept = len(right["annotations"])
    assert len(content["annotations"]) == kept and said.count("left out") <= len(places)
    again, said = cleaned(content)
    assert again == content and "×" not in said


# -- one by one ------------------------------------------------------------------------------------


def test_it_says_what_it_changed(cleaned):
    content = coco(30)
    content["annotations"][4]["iscrowd"] = content["annotations"][6]["iscrowd"] = None
    content["annotations"][5]["bbox"] = [1, 2, 0, 3]
    content["annotations"][7].update(ignore=1, id=101)
    result, said = cleaned(content)
    assert said.splitlines()[:-1] == [
        "2 × iscrowd missing, now 0 (first: 4.png, id 104)",
        "1 × left out: box has no size (first: 5.png, id 105: [1, 2, 0, 3])",
        "1 × ignore, now iscrowd 1 (first: 7.png, id 101)",
        "29 × annotation numbered anew (first: from 1)",
    ]
    assert [a["id"] for a in result["annotations"]] == [*range(1, 30)]
    assert result["annotations"][6]["iscrowd"] == 1


BOX = [25, 12, 14, 17]
X, Y, W, H = BOX


@pytest.mark.parametrize(
    "box, option",
    [
        ([X, Y, X + W, Y + H], "--boxes xyxy"),
        ([X + W / 2, Y + H / 2, W, H], "--boxes centre"),
        ([X / WIDTH, Y / HEIGHT, W / WIDTH, H / HEIGHT], "--boxes shares"),
        (
            [(X + W / 2) / WIDTH, (Y + H / 2) / HEIGHT, W / WIDTH, H / HEIGHT],
            "--boxes centre-shares",
        ),
    ],
)
def test_boxes_in_another_layout_are_converted_when_told_so(cleaned, box, option):
    content = coco()
    for annotation in content["annotations"]:
        annotation.update(bbox=box, area=W * H)
    _, said = cleaned(content)
    assert said.startswith("error: 10 of 10 boxes are not x, y, width, height") and option in said
    result, said = cleaned(content, *option.split())
    assert all(a["bbox"] == pytest.approx(BOX) for a in result["annotations"])
    assert f"10 × box read as {option.split()[1]} (first: [" in said


def test_many_boxes_outside_are_cut_only_when_told_so(cleaned):
    content = coco()
    for annotation in content["annotations"][:3]:
        annotation["bbox"] = [35, 2, 10, 20]
    assert "3 of 10 boxes are not" in cleaned(content)[1]
    result, said = cleaned(content, "--boxes", "xywh")
    assert result["annotations"][0]["bbox"] == [35, 2, 5, 20]
    assert result["annotations"][0]["area"] == 100 and "3 × box cut to its image" in said


def test_sizes_are_read_from_the_files(cleaned, tmp_path):
    content = coco()
    for image in content["images"]:
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / image["file_name"])
    assert cleaned(content, "--images", str(tmp_path))[0] == content
    content["images"][4].update(width=-1)
    content["images"][5].update(width=HEIGHT, height=WIDTH)
    assert "4.png: width, height are not whole" in cleaned(content)[1]
    result, said = cleaned(content, "--images", str(tmp_path))
    assert result["images"] == coco()["images"] and "2 × size as in the image's file" in said
    (tmp_path / "4.png").unlink()
    assert "4.png" in cleaned(content, "--images", str(tmp_path))[1]


def test_masks(cleaned):
    content = coco()
    polygon = [1, 2, 11, 2, 11, 22]
    for annotation in content["annotations"]:
        annotation["segmentation"] = [polygon]
    content["annotations"][4]["segmentation"] = [polygon, [1, 2]]
    content["annotations"][5]["segmentation"] = [[1, 2, 11, 22]]  # a rectangle
    assert cleaned(content)[0] == content  # nobody reads them
    result, said = cleaned(content, "--masks")
    assert result["annotations"][4]["segmentation"] == [polygon]
    assert len(result["annotations"]) == 9 and "1 × left out: segmentation is not" in said


def test_what_cannot_be_decided_is_refused(cleaned, tmp_path):
    content = coco()
    content["images"][4]["id"] = 7
    assert "image id 7 occurs 2 times" in cleaned(content)[1]
    assert (
        "nothing would remain: left out: segmentation is missing" in cleaned(coco(), "--masks")[1]
    )
    assert "not COCO's annotation format" in cleaned([])[1]
    with pytest.raises(NATSError, match="cannot be read"):
        read_annotations(str(tmp_path / "out.json"), Needs())
