"""Which PyTorch the package takes."""

import importlib
import sys

import pytest
import torch

import detectron2_nats


@pytest.mark.parametrize("version", ["1.13.1", "2.3.1+cu121", "2.0.0a0+git1234567"])
def test_an_old_torch_is_named_at_import(monkeypatch, version):
    for name in [name for name in sys.modules if name.split(".")[0] == "detectron2_nats"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError) as caught:
        importlib.import_module("detectron2_nats")
    expected = f"detectron2_nats needs PyTorch 2.4 or newer, this is {version}: update torch and "
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize("version", ["2.4.0", "2.14.1+cu130", "2.10.0a0+git1234567", "3.0"])
def test_a_newer_torch_is_taken(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    importlib.reload(detectron2_nats.versions)
