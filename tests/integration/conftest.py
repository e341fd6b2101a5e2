import pytest
from runs import TINY


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return str(path)


@pytest.fixture(scope="session", autouse=True)
def embedded_data():
    from detectron2_nats.toy.sets import ensure_embedded_dataset

    ensure_embedded_dataset()
