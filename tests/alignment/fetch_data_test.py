import pytest

from experiments.common.fetch_data import fetch_math500, split_math500
from jaxrl_suite.alignment.tasks import parquet_task

PROBLEMS = [{"problem": f"What is {i}?", "answer": str(i), "subject": "Algebra", "level": 1} for i in range(500)]


def test_split_is_a_partition_and_deterministic():
    splits = split_math500(PROBLEMS)
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 300, "val": 100, "test": 100}
    answers = [row["reward_model"]["ground_truth"] for rows in splits.values() for row in rows]
    assert sorted(answers, key=int) == [str(i) for i in range(500)]
    assert splits == split_math500(PROBLEMS)
    with pytest.raises(ValueError, match="problems=3: expected 500"):
        split_math500(PROBLEMS[:3])


def test_files_are_read_by_the_studies(tmp_path):
    import json

    source = tmp_path / "test.jsonl"
    source.write_text("\n".join(map(json.dumps, PROBLEMS)))
    paths = fetch_math500(tmp_path / "math500", address=source.as_uri())
    task = parquet_task(paths[2])
    assert len(task.prompts) == 100 and not task.skipped
    answer = task.columns["answer"][0]
    assert task.prompts[0][0]["content"].startswith(f"What is {answer}?")
    assert task.accuracy(task.prompts[:1], [f"\\boxed{{{answer}}}"], answer=[answer]) == [1.0]
