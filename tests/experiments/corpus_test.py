import pytest

from experiments.common.corpus import source_bytes, source_files


def test_source_text_is_python_and_of_the_length_asked_for():
    text = source_bytes(50_000)
    assert text.shape == (50_000,) and b"import" in text.tobytes()
    assert all(not path.name.startswith("_") for path in source_files())


def test_asking_for_more_than_there_is():
    with pytest.raises(ValueError, match=r"num_bytes=1000000000000: .* Ask for fewer"):
        source_bytes(10**12)
