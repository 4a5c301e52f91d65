"""Documents that --data names: tasks, and parts of the length asked for."""

from __future__ import annotations

import pytest
from benchmark_runs import make_text, write_texts
from tiny_text_model import make_tiny_tokenizer, write_jsonl

from attention_predictor.errors import ConfigError, DataError
from attention_predictor.eval.harness.windows import Source, Windows, parse_sources


@pytest.fixture
def folder(tmp_path):
    write_texts(tmp_path, count=3, sentences=60)
    (tmp_path / "short.txt").write_text("Too short.")
    write_jsonl(
        tmp_path / "asked.jsonl", [{"text": "Once. " * 30, "continuations": ["Who?\n\n", "Nobody at all.\n\n"]}]
    )
    return tmp_path


def windows(folder, *places, **changes) -> Windows:
    sources = parse_sources([str(folder / place) if "=" not in place else place for place in places])
    return Windows(sources, make_tiny_tokenizer(), **({"context": 500, "tail": 40} | changes))


class TestSource:
    def test_forms(self, folder):
        assert Source.parse(f"{folder}/a.txt") == Source("a", (f"{folder}/a.txt",))
        assert Source.parse(f"books={folder}") == Source("books", (str(folder),))
        assert Source.parse(f"few={folder}/[ab]*.txt") == Source("few", (f"{folder}/a.txt", f"{folder}/b.txt"))

    def test_bad_ones(self, folder):
        with pytest.raises(DataError, match=r"--data few=.*/z\*.txt: no file matches"):
            Source.parse(f"few={folder}/z*.txt")
        with pytest.raises(ConfigError, match=r"'a b' can't name a task: give it a name \(name=a b.txt\)"):
            Source.parse("a b.txt")
        with pytest.raises(ConfigError, match="--data: names must differ, got a, a"):
            parse_sources([f"{folder}/a.txt", f"a={folder}/b.txt"])


class TestWindows:
    def test_parts_begin_where_the_text_does(self, folder):
        ((name, part),) = windows(folder, "a.txt").of("a")
        tokenizer = make_tiny_tokenizer()
        (tail,) = part.tails
        assert name == "a.txt#0"
        assert (len(part.prompt), len(tail)) == (460, 40)
        assert part.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(part.prompt[1:] + tail) == make_text(0, 60)[:499]

    def test_several_of_a_file(self, folder):
        found = list(windows(folder, "a.txt", per_file=3).of("a"))
        assert [name for name, _ in found] == ["a.txt#0", "a.txt#1", "a.txt#2"]
        assert len({tuple(part.prompt) for _, part in found}) == 3
        assert make_tiny_tokenizer().decode(found[-1][1].tails[0]) == make_text(0, 60)[-40:]

    def test_short_documents_are_left_out_and_counted(self, folder):
        many = windows(folder, f"all={folder}/*.txt")
        assert [name for name, _ in many.of("all")] == ["a.txt#0", "b.txt#0", "c.txt#0"]
        assert many.check("all", None) == 1
        assert many.check("all", 2) == 0  # more than enough
        with pytest.raises(DataError, match=r"--data short: no document has 500 tokens \(--context\)"):
            windows(folder, "short.txt").check("short", None)

    def test_continuations_only_where_they_are_wanted(self, folder):
        ((_, part),) = windows(folder, "asked.jsonl", continuations=True, tail=64).of("asked")
        texts = [make_tiny_tokenizer().decode(tail) for tail in part.tails]
        assert texts == ["Who?\n\nNobody at ", "Nobody at all.\n\n"]
        ((_, plain),) = windows(folder, "asked.jsonl", context=100).of("asked")
        assert plain.tails[0][-6:] == part.prompt[-6:]

    def test_bad_lengths(self, folder):
        for tail in (0, 500):
            with pytest.raises(ConfigError, match=f"--tail {tail}: expected 1 to below --context 500"):
                windows(folder, "a.txt", tail=tail)
        with pytest.raises(ConfigError, match="--per-file 0: expected at least 1"):
            windows(folder, "a.txt", per_file=0)
