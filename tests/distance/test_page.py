"""The table of docs/distance.md is the one that the results file gives."""

from benchmarks import distances, results


def test_the_table_of_the_page_is_that_of_the_results():
    text = distances.PAGE.read_text(encoding="utf-8")
    assert text == distances.with_table(text), "run python -m benchmarks.distances --page"
    assert distances.BLOCK.search(text) and results.read(results.DISTANCES)
