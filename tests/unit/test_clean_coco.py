"""tools/clean_coco.py: its files are accepted, and say what was changed."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image
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


def test_it_says_what_it_changed(cleaned):
    content = coco(30)
    content["annotations"][4]["iscrowd"] = content["annotations"][6]["iscrowd"] = None
    content["annotations"][5]["bbox"] = [1, 2, 0, 3]
    content["annotations"][7].update(ignore=1, id=101)
    del content["annotations"][8]["area"]
    content["annotations"][9]["category_id"] = 4
    content["annotations"][10]["bbox"] = [1, -5, 10, 20]
    result, said = cleaned(content)
    assert said.splitlines()[:-1] == [
        "2 × iscrowd missing, now 0 (first: 4.png, id 104)",
        "1 × left out: box has no size (first: 5.png, id 105: [1, 2, 0, 3])",
        "1 × ignore, now iscrowd 1 (first: 7.png, id 101)",
        "1 × area missing, now the box's (first: 8.png, id 108)",
        "1 × left out: category_id is not listed (first: 9.png, id 109: 4)",
        "1 × box cut to its image (first: 10.png, id 110)",
        "28 × annotation numbered anew (first: from 1)",
    ]
    assert [a["id"] for a in result["annotations"]] == [*range(1, 29)]
    assert result["annotations"][7]["area"] == 200
    assert result["annotations"][8]["bbox"] == [1, 0, 10, 15]
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
