import shutil

import pytest

from tests.models.smollm2 import write_huggingface_folder


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory):
    """SmolLM2-135M-Instruct as a Hugging Face folder, removed at the end: it is half a gigabyte."""
    folder = write_huggingface_folder(tmp_path_factory.mktemp("smollm2") / "SmolLM2-135M-Instruct")
    yield folder
    shutil.rmtree(folder)
