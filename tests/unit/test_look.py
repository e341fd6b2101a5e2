"""The verdict of each branch of the rule, and what nats-look is told."""

import json
import shlex

import numpy as np
import pytest
import torch
import torchvision
from calls import call
from PIL import Image

import nats_commands
from detectron2_nats import NATSError
from detectron2_nats.commands import look as command
from detectron2_nats.look.objects import (
    InputSize,
    Record,
    boxes_on_input,
    image_on_input,
    normalised,
    read_coco,
)
from detectron2_nats.look.picture import plot_look
from detectron2_nats.look.receptive_field import Extent
from detectron2_nats.look.rule import DRAWN, Objects, look, verdict


def objects(*sizes):
    """Boxes of (height, width)."""
    return Objects(np.array([[5.0, 7.0, 5 + w, 7 + h] for h, w in sizes]))


@pytest.mark.parametrize(
    "sizes, extent, case, draw",
    [
        # the seven measured cases: half the objects up to, and what the detector sees
        ([(97, 60)], (41, 41), "larger", f"--random --dilations {DRAWN}"),
        ([(202, 100)], (43, 43), "larger", f"--random --dilations {DRAWN}"),
        ([(50, 101)], (43, 43), "larger", f"--random --dilations {DRAWN}"),
        ([(37, 30)], (21, 21), "between", ""),
        ([(73, 60)], (43, 43), "between", ""),
        ([(30, 18)], (41, 41), "whole", ""),
        ([(55, 50)], (231, 231), "whole", ""),
        # elongated: bars, columns, lines of text
        ([(18, 97)], (41, 43), "elongated", "--uniform 1x5"),
        ([(228, 18)], (43, 43), "elongated", "--uniform 5x1"),
        ([(9, 26)] * 6 + [(9, 9)] * 4, (21, 19), "between", ""),  # 2.9 times
        ([(9, 27)] * 6 + [(9, 9)] * 4, (21, 19), "elongated", "--uniform 1x5"),
        # long ones are too few, lie in both directions, or are seen whole
        ([(9, 90)] * 4 + [(90, 80)] * 6, (43, 43), "larger", f"--random --dilations {DRAWN}"),
        ([(9, 90)] * 7 + [(90, 9)] * 3, (43, 43), "larger", f"--random --dilations {DRAWN}"),
        ([(9, 90)] * 8 + [(90, 9)] * 2, (43, 43), "elongated", "--uniform 1x5"),
        ([(9, 40)], (43, 43), "whole", ""),
        # of a field that is long itself, the direction that lacks counts
        ([(9, 90)], (43, 95), "whole", ""),
        ([(90, 9)], (43, 95), "elongated", "--uniform 5x1"),
        ([(90, 90)], (43, 95), "larger", f"--random --dilations {DRAWN}"),
        ([(43, 43)], (43, 43), "whole", ""),
        ([(86, 43)], (43, 43), "between", ""),
    ],
)
def test_verdicts(sizes, extent, case, draw):
    found = verdict(objects(*sizes), Extent(*extent))
    assert " ".join(found.draw) == draw
    names = {"larger": "Larger: ", "whole": "Seen whole: "}
    assert found.sentence.startswith(names.get(case, f"{case.capitalize()}: "))
    assert found.sentence.endswith(".") and "\n" not in found.sentence
    assert f"{extent[0]} × {extent[1]} px" in found.sentence


def test_the_report_and_the_picture():
    network = torchvision.models.resnet18().eval()
    boxes = np.array([[0, 0, 20, 10]] * 3 + [[0, 0, 30, 60]])
    found = look(network, [torch.rand(3, 40, 50)], boxes, levels=["conv1", "layer1"])
    assert found.levels["conv1"].height == 7
    text = found.report()
    assert "conv1                    7        7" in text
    assert "4 objects; 75% are wider than tall, 25% taller than wide.\n\n" in text
    assert text.endswith(found.verdict.sentence)
    figure = plot_look(found, np.zeros((40, 50, 3), np.uint8), boxes)
    (axes,) = figure.axes
    sizes = [(patch.get_height(), patch.get_width()) for patch in axes.patches]
    extents = [(extent.height, extent.width) for extent in found.levels.values()]
    assert sizes == [(10, 20)] * 3 + [(60, 30)] + extents + [(10, 20)]  # and the median object
    assert look(network, [torch.rand(3, 40, 50)], levels=["conv1"]).verdict is None
    for boxes, words in (
        (np.zeros((0, 4)), "one or more"),
        ([1, 2], "expected"),
        ([[4, 4, 4, 9]], "x0 < x1"),
    ):
        with pytest.raises(NATSError, match=words):
            look(network, [torch.rand(3, 40, 50)], boxes, levels=["conv1"])


def test_objects_are_as_large_as_on_the_input(tmp_path):
    size = InputSize(100, 150)
    wide = Record("", 200, 400, np.array([[0.0, 0.0, 80.0, 40.0]]))  # shown at 75 × 150
    tall = Record("", 100, 50, np.array([[5.0, 5.0, 10.0, 45.0]]))  # at 150 × 75
    shown = boxes_on_input([wide, tall], size)
    np.testing.assert_allclose(shown, [[0, 0, 30, 15], [7.5, 7.5, 15, 67.5]])
    assert InputSize(0, 150).scale(400, 300) == 1
    Image.new("RGB", (400, 200), (255, 0, 51)).save(tmp_path / "a.png")
    pixels = image_on_input(Record(str(tmp_path / "a.png"), 200, 400), size)
    assert pixels.shape == (75, 150, 3)
    bgr = normalised(pixels, [1, 0, 5], [2, 1, 10], "BGR")
    assert bgr[:, 3, 3].tolist() == [25, 0, 25]
    with pytest.raises(NATSError, match="b.png: cannot be read: No such file"):
        image_on_input(Record(str(tmp_path / "b.png"), 200, 400), size)
    with pytest.raises(NATSError, match="a.png: it has 400×200 px, the annotations say 200×400"):
        image_on_input(Record(str(tmp_path / "a.png"), 400, 200), size)
    Image.fromarray(np.zeros((200, 400), np.uint16)).save(tmp_path / "wide.png")
    with pytest.raises(NATSError, match="wide.png: cannot be read: .*more than 8 bits"):
        image_on_input(Record(str(tmp_path / "wide.png"), 200, 400), size)


BOX = {"bbox": [1, 2, 30, 4], "area": 120, "category_id": 1}


def coco(folder, **changes):
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 90} for i in (1, 2)],
        "annotations": [
            {**BOX, "id": 1, "image_id": 1, "iscrowd": 0},
            {**BOX, "id": 2, "image_id": 2, "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "line"}],
    }
    (folder / "val.json").write_text(json.dumps({**content, **changes}))
    Image.new("RGB", (90, 60)).save(folder / "1.png")
    return str(folder / "val.json")


def test_reading_annotations(tmp_path):
    (record,) = read_coco(coco(tmp_path), "images")
    assert (record.path, record.height, record.width) == ("images/1.png", 60, 90)
    assert record.boxes.tolist() == [[1, 2, 31, 6]]
    for changes, words in (
        ({"annotations": []}, "val.json: contains no object"),
        ({"annotations": [{"image_id": 7, "bbox": [1, 2, 3, 4]}]}, "image_id is not listed: 7"),
        (
            {"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2]}]},
            r"bbox is not .* \[1, 2\]",
        ),
        ({"images": None}, "not COCO's annotation format"),
    ):
        with pytest.raises(NATSError, match=words):
            read_coco(coco(tmp_path, **changes), "images")
    (tmp_path / "val.json").write_text("[")
    with pytest.raises(NATSError, match="not COCO's annotation format"):
        read_coco(str(tmp_path / "val.json"), "images")
    with pytest.raises(NATSError, match="none.json: cannot be read"):
        read_coco(str(tmp_path / "none.json"), "images")


# -- the command --------------------------------------------------------------------------------


def nats_look(*arguments, status=0):
    return call("nats-look", *arguments, status=status)


def test_a_network_of_torchvision(tmp_path):
    network = ["--network", "torchvision:resnet18", "--levels", "conv1", "layer1.0.conv1"]
    printed = nats_look(*network)
    assert printed.startswith("The weights are drawn at random")
    assert printed.endswith(
        "No objects are given: --annotations and --images, and there is a verdict.\n"
    )
    torch.save({"model": torchvision.models.resnet18().state_dict()}, tmp_path / "r18.pth")
    data = [
        "--annotations",
        coco(tmp_path),
        "--images",
        tmp_path,
        "--weights",
        tmp_path / "r18.pth",
    ]
    picture = ["--size", 120, "--output", tmp_path / "out"]  # the object is 60 × 8 there
    printed = nats_look(*network, *data, *picture)
    assert "Elongated: half of the objects are 60 px wide" in printed
    assert f"wrote {tmp_path}/out/look.png\n" in printed
    following = (
        "next: nats-draw --network torchvision:resnet18 --uniform 1x5 --output output/drawn\n"
    )
    assert printed.endswith(following)
    assert (tmp_path / "out/look.png").stat().st_size > 1000


def test_a_network_of_timm(tmp_path):
    """Its weights too; and it is the same network as torchvision's."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    weights = timm.create_model("resnet18", pretrained=False).state_dict()
    torch.save(weights, tmp_path / "r18.pth")
    arguments = ["--weights", tmp_path / "r18.pth", "--levels", "layer1", "--size", 120]
    arguments += ["--annotations", coco(tmp_path), "--images", tmp_path]
    of_timm, of_torchvision = (
        nats_look("--network", f"{library}:resnet18", *arguments)
        for library in ("timm", "torchvision")
    )
    assert of_timm.splitlines()[2].startswith("layer1 ") and "holds" not in of_timm
    assert of_timm.splitlines()[:-1] == of_torchvision.splitlines()[:-1]
    assert of_timm.endswith(
        "next: nats-draw --network timm:resnet18 --uniform 1x5 --output output/drawn\n"
    )


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "give CONFIG and WEIGHTS of a detector, or --network"),
        (["--network", "torchvision:resnet18", "a.yaml"], "a.yaml: needs CONFIG, not --network"),
        (["--network", "torchvision:resnet18", "--annotations", "a"], "go together"),
        (["--network", "torchvision:resnet18", "--weights", "a"], "weights a: no such file"),
        (["--network", "torchvision:resnet18", "--weights", __file__], "not a state dict"),
        (["--network", "torchvision:nothing"], "network torchvision:nothing: torchvision cannot"),
        (
            ["--network", "torchvision:resnet18", "--output", "x", "--levels", "conv1"],
            "needs images",
        ),
        (["a.yaml", "b.pth", "--weights", "c.pth"], "--weights is for --network"),
        (["a.yaml", "b.pth"], "config a.yaml not found"),
    ],
)
def test_bad_arguments(arguments, words):
    assert words in nats_look(*arguments, status=2)


@pytest.mark.parametrize(
    "words, meaning",
    [
        (["c"], ("c", "", [])),
        (["c", "w"], ("c", "w", [])),
        (["c", "K", "V"], ("c", "", ["K", "V"])),
        (["c", "w", "K", "V"], ("c", "w", ["K", "V"])),
    ],
)
def test_what_the_words_mean(words, meaning):
    args = nats_commands.parser_of("look").parse_intermixed_args(words)
    assert command._words(args) == meaning


def test_weights_of_another_network(tmp_path):
    torch.save(torchvision.models.resnet50().state_dict(), tmp_path / "r50.pth")
    arguments = ["--network", "torchvision:resnet18", "--weights", tmp_path / "r50.pth"]
    printed = nats_look(*arguments, status=2)
    assert "are they of another network?" in printed


def test_the_next_command_of_a_network_without_stages(tmp_path):
    """Its convs are named by a pattern, and nats-draw takes that."""
    network = ["--network", "torchvision:mobilenet_v3_small"]
    data = ["--annotations", coco(tmp_path), "--images", tmp_path, "--size", 120]
    printed = nats_look(*network, *data, "--levels", "features.1")
    words = printed.splitlines()[-1].removeprefix("next: ")
    assert "--convs '*'" in words
    printed = call(*shlex.split(words.replace("output/drawn", str(tmp_path))))
    assert "features.1.block.0.0" in (tmp_path / "architecture.yaml").read_text()
    assert "next: detectron2_nats.apply_architecture" in printed
