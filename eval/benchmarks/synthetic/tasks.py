"""Long-context tasks as text: facts planted in a haystack, and questions whose answers stand only there.

All evaluation and training on retrieval takes its documents from here: the pocket model's training
data, its evaluation, the predictor's recordings and the demo. So the wording lives in one place (the
`*_statement` and `*_question` helpers), and whoever plants facts by hand asks for them the way the model has
learned.

A document is a list of *segments*, each ending in a newline, and every question and every answer begins
where a new pre-token begins. A byte-level BPE that never merges across the end of a newline run therefore
gives the same tokens whether it sees a segment alone or the whole text; that makes it exact to tokenise
haystack paragraphs once and only the planted sentences afterwards, and to tokenise a prompt and its answer
apart.

Six tasks: `kv` (numbers of keys), `facts` (where people live, what they work as), `chain` (variables defined
by other variables), `labels` (few-shot labels of a category never named), `excerpt` (which numbered
paragraph a quotation is from) and `copy` (finish a sentence of the haystack verbatim).

Names are split in two by a hash. `split="train"` and `split="eval"` never share a key, a person, a variable
or a label, so a right answer in evaluation cannot be a memory.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from attention_predictor.errors import ConfigError

Split = Literal["train", "eval"]
Count = Callable[[str], int]

TASKS = ("kv", "facts", "chain", "labels", "excerpt", "copy")
BREAK = "\n\n"  # ends every segment and every answer: the model's sign to stop
PATIENCE = 1000  # paragraphs in a row that are too long


@dataclass(frozen=True)
class Example:
    """One question about one document; a model is right when it continues `prompt` with exactly `answer`."""

    task: str
    document: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return self.document + self.question


@dataclass(frozen=True)
class Question:
    """A question with its answer, without the document: many of them share one."""

    task: str
    question: str
    answer: str


@dataclass(frozen=True)
class Sample:
    """One document and all the questions asked about it."""

    segments: tuple[str, ...]
    questions: tuple[Question, ...]

    @property
    def document(self) -> str:
        return "".join(self.segments)

    def examples(self) -> list[Example]:
        """Each question alone with the document, as in evaluation (one prefill serves them all)."""
        return [Example(q.task, self.document, q.question, q.answer) for q in self.questions]

    def transcript(self) -> Iterator[tuple[str, bool]]:
        """The document and then every question and answer in a row, as in training.

        Yields pieces of text with a flag: is this an answer (and its end), to be weighted more?
        """
        for segment in self.segments:
            yield segment, False
        for q in self.questions:
            yield q.question, False
            yield q.answer + BREAK, True


# ------------------------------------------------------------------------------------------------- wording


def ask(question: str) -> str:
    """The frame around every question. The answer follows directly, with the space it begins with."""
    return f"Question: {question}\nAnswer:"


def kv_statement(key: str, number: int | str, kind: str = "secret number") -> str:
    return f"The {kind} of the {key} is {number}."


def kv_question(key: str, kind: str = "secret number") -> str:
    return ask(f"What is the {kind} of the {key}?")


def home_statement(person: str, city: str) -> str:
    return f"{person} lives in {city}."


def home_question(person: str) -> str:
    return ask(f"Where does {person} live?")


def job_statement(person: str, job: str) -> str:
    return f"{person} works as a {job}."


def job_question(person: str) -> str:
    return ask(f"What does {person} work as?")


def chain_statement(name: str, value: str) -> str:
    return f"Let {name} = {value}."


def chain_question(name: str) -> str:
    return ask(f"What is the value of {name}?")


def label_statement(item: str, label: str) -> str:
    return f"The label of {item} is {label}."


def label_question(item: str) -> str:
    return ask(f"What is the label of {item}?")


def paragraph_header(number: int) -> str:
    return f"Paragraph {number}\n"


def excerpt_question(excerpt: str) -> str:
    return ask(f"Which paragraph contains “{excerpt}”?")


def copy_question(beginning: str) -> str:
    # The beginning stands after "Answer:", so that the verbatim rest simply goes on from it.
    return ask("How does this sentence of the text go on?") + " " + beginning


# --------------------------------------------------------------------------------------------------- words


def _words(text: str) -> list[str]:
    return text.split()


_ADJECTIVES = _words("""
    amber ancient autumn azure bitter bold brave bright broken bronze calm clever cold copper coral
    crimson crooked crystal curious dark distant dusty eager early ebony electric emerald empty
    fading faithful fierce floating forgotten fragile frozen gentle gilded golden grand green hidden
    hollow humble icy indigo iron ivory jade jolly lonely lucky marble mellow midnight misty modest
    narrow noble northern olive orange painted pale patient pearl plain polished proud purple quiet
    rapid restless rusty sacred scarlet secret shady silent silver simple sleepy slender smooth
    solemn southern spiral stormy sturdy sunny swift tangled tender thirsty timid twisted velvet
    violet wandering western white wild winter wise wooden yellow young
""")
_NOUNS = _words("""
    anchor antler apple arrow badger barrel basket beacon bell bishop blanket boulder bridge bucket
    cactus camel candle canyon castle cedar chapel chimney clock compass cottage cradle dagger
    desert dolphin dragon drum eagle ember engine falcon feather ferry fiddle forest fountain fox
    galley garden garnet gate glacier goblet hammer harbor harp heron hill island jackal jasmine
    kettle key kite lantern lark lemon lion lobster lute mantle maple meadow mill mirror monk needle
    nest oak orchard otter owl oyster panther parrot pebble pepper pigeon pillar pine plough pony
    quarry rabbit raven ribbon river robin rocket saddle sailor scholar shepherd shield sparrow
    spider statue stove swan temple thistle thunder tiger tower trumpet tulip tunnel turtle valley
    violin walnut weaver well whale willow window wolf
""")
_KINDS = ("secret number", "access code", "locker number", "ticket number")
_FIRST = _words("""
    Ada Adrian Agnes Albert Alma Amos Anita Anton Bella Benno Bruno Carla Cecil Celia Clara Conrad
    Cora Cyrus Daisy Dario Della Dora Edgar Edith Edwin Elena Elias Ella Emil Enid Erik Esther Ethan
    Eva Felix Fiona Flora Frieda Gideon Gloria Greta Gustav Hanna Hazel Hector Helga Hugo Ida Igor
    Ines Irene Isaac Ivan Ivy Jasper Joel Jonas Judith Julius Karin Klaus Lara Laura Leon Lida Linus
    Lotte Lucas Lydia Mabel Marco Marta Martin Maya Milo Mina Mira Nadia Naomi Nina Nora Oliver Olga
    Oscar Otto Paula Pedro Petra Quentin Ramona Rosa Rufus Ruth Selma Silas Simon Sofia Stella Sven
    Tessa Theo Tobias Ursula Vera Victor Viola Walter Wanda Xavier Yara Yvonne Zelda
""")
_LAST = _words("""
    Abbott Acker Albrecht Archer Baker Barlow Becker Bennett Berger Bishop Blum Bolton Brandt Brook
    Burke Calder Carver Castro Clement Conway Cooper Cortez Crane Dalton Decker Dempsey Dixon Dorsey
    Drake Draper Duarte Eklund Ellis Farrow Fischer Fletcher Forster Frost Garcia Gibbs Grant Graves
    Haas Hale Hansen Harper Hayes Hoffman Holt Huber Ibsen Iverson Jansen Jensen Keller Kerr Klein
    Kovac Krause Lambert Lang Larsen Lehmann Lindt Lopez Madsen Marsh Mason Mercer Meyer Moreno Moss
    Nash Neumann Nolan Norris Novak Olsen Ortega Parker Pavlov Petrov Porter Quist Ramos Reed Reyes
    Richter Rivera Roth Rossi Sander Santos Sauer Schmidt Sharp Silva Sloan Sorel Stein Stone Strand
    Sutton Thorne Torres Turner Vance Vogel Wagner Walsh Weber Werner Winter Wolfe York Young Zeller
    Zimmer
""")
_CITIES = _words("""
    Aberdeen Accra Algiers Amsterdam Ankara Antwerp Athens Auckland Baghdad Bangkok Barcelona Basel
    Beijing Belfast Belgrade Bergen Berlin Bogota Bologna Bombay Boston Bremen Brussels Budapest
    Cairo Calgary Cardiff Chicago Cologne Cordoba Cracow Dakar Dallas Damascus Delhi Denver Dresden
    Dublin Durban Edinburgh Florence Geneva Genoa Ghent Glasgow Granada Hamburg Hanoi Havana
    Helsinki Houston Istanbul Jakarta Kiev Kyoto Lagos Leeds Leipzig Lima Lisbon London Lyon Madrid
    Malaga Manila Melbourne Memphis Milan Montreal Moscow Munich Nairobi Naples Nice Osaka Oslo
    Ottawa Oxford Palermo Paris Perth Phoenix Porto Prague Quito Riga Rome Rotterdam Salzburg
    Santiago Seattle Seoul Seville Shanghai Sofia Stockholm Sydney Tehran Tokyo Toronto Trieste
    Tunis Turin Valencia Venice Verona Vienna Warsaw York Zagreb Zurich
""")
_JOBS = _words("""
    baker barber bookbinder brewer builder butcher carpenter chemist clerk cobbler cook dancer
    dentist diver doctor farmer fisherman florist gardener glazier goldsmith grocer guard guide
    hatter judge lawyer librarian locksmith mason mechanic miller miner musician notary nurse
    painter pilot plumber poet porter potter printer sailor sculptor singer smith soldier surgeon
    surveyor tailor tanner teacher translator waiter watchmaker weaver welder
""")
_CATEGORIES = tuple(
    _words(text)
    for text in (
        "bear camel cow deer dog donkey elephant fox goat horse lion monkey mouse pig rabbit sheep wolf",
        "crow dove duck eagle falcon goose hawk hen heron lark owl parrot pigeon raven robin sparrow swan",
        "black blue brown crimson gold green grey orange pink purple red scarlet silver violet white yellow",
        "apple apricot banana cherry fig grape lemon melon olive orange peach pear plum raspberry strawberry",
        "axe chisel drill file hammer knife ladder nail pincers rope saw screw shovel spade",
        "baker butcher carpenter cook doctor farmer gardener judge lawyer miller nurse sailor soldier tailor",
        "Berlin Boston Cairo Dublin Geneva London Madrid Moscow Naples Paris Rome Tokyo Venice Vienna Warsaw",
        "arm brain chin ear elbow eye finger foot hand heart knee leg mouth neck nose shoulder throat",
        "boots bonnet cap cloak coat dress glove gown hat jacket shawl shirt shoe skirt stocking trousers",
        "bench bed bookcase chair couch cupboard desk drawer lamp mirror shelf sofa stool table wardrobe",
        "April August December February January July June March May November October September",
        "bread butter cake cheese chicken egg ham honey meat milk pie rice salt soup sugar",
    )
)
_ONSETS = _words("b bl br d dr f fl g gl gr k kl kr l m n p pl pr r s sk sl st t tr v w z")
_VOWELS = _words("a e i o u")
_CODAS = _words("b d k l lm lt m n nd nk p r rd rn s st t x")


def _belongs(name: str, split: Split) -> bool:
    """One name in eight is kept for evaluation, chosen by its hash: no list to keep."""
    return (zlib.crc32(name.encode()) % 8 == 0) == (split == "eval")


def _draw(make: Callable[[], str], n: int, split: Split, taken: set[str] | None = None) -> list[str]:
    """`n` different names of this split from the random maker `make`."""
    names: dict[str, None] = {}
    while len(names) < n:
        name = make()
        if _belongs(name, split) and not (taken and name in taken):
            names[name] = None
    return list(names)


def _pseudo_word(rng: random.Random) -> str:
    return "".join(rng.choice(part) for part in (_ONSETS, _VOWELS, _ONSETS, _VOWELS, _CODAS))


def _pairs(rng: random.Random, left: list[str], right: list[str], n: int, split: Split) -> list[str]:
    """Two-word names drawn from few words, so that neither word alone tells one name from the others."""
    few = max(12, 2 * n)
    left, right = rng.sample(left, min(few, len(left))), rng.sample(right, min(few, len(right)))
    return _draw(lambda: f"{rng.choice(left)} {rng.choice(right)}", n, split)


# --------------------------------------------------------------------------------------------------- tasks

Planted = tuple[list[str], list[Question]]


def _kv(rng: random.Random, n: int, split: Split) -> Planted:
    kind = rng.choice(_KINDS)
    numbers = {key: rng.randint(1000, 999_999) for key in _pairs(rng, _ADJECTIVES, _NOUNS, n, split)}
    statements = [kv_statement(key, number, kind) for key, number in numbers.items()]
    return statements, [Question("kv", kv_question(k, kind), f" {v}") for k, v in numbers.items()]


def _facts(rng: random.Random, n: int, split: Split) -> Planted:
    statements, questions = [], []
    for person in _pairs(rng, _FIRST, _LAST, n, split):
        city, job = rng.choice(_CITIES), rng.choice(_JOBS)
        lives, works = rng.choice(((True, False), (True, False), (False, True), (True, True)))
        if lives:
            statements.append(home_statement(person, city))
            questions.append(Question("facts", home_question(person), f" {city}"))
        if works:
            statements.append(job_statement(person, job))
            questions.append(Question("facts", job_question(person), f" {job}"))
    return statements, questions


def _chain(rng: random.Random, n: int, split: Split) -> Planted:
    """Chains of two to four links; the answer spells the way, so every link is one retrieval."""
    statements, questions = [], []
    taken: set[str] = set()
    for _ in range(max(1, n // 3)):
        names = _draw(lambda: _pseudo_word(rng), rng.randint(2, 4), split, taken)
        taken.update(names)
        way = [*names, str(rng.randint(1000, 9999))]
        statements += [chain_statement(a, b) for a, b in pairwise(way)]
        questions.append(Question("chain", chain_question(way[0]), " " + " = ".join(way)))
    return statements, questions


def _labels(rng: random.Random, n: int, split: Split) -> Planted:
    """Each hidden category gets a made-up label; the items asked for are never among the examples."""
    categories = rng.sample(_CATEGORIES, min(len(_CATEGORIES), rng.randint(2, max(2, n // 3))))
    labels = _draw(lambda: _pseudo_word(rng), len(categories), split)
    statements, questions = [], []
    seen: set[str] = set()
    for words, label in zip(categories, labels, strict=True):
        # A word of two categories ("orange") would have two labels.
        items = [w for w in rng.sample(words, len(words)) if w not in seen]
        seen.update(words)
        shown = min(len(items) - 2, max(2, n // len(categories)))
        statements += [label_statement(item, label) for item in items[:shown]]
        questions += [Question("labels", label_question(i), f" {label}") for i in items[shown : shown + 2]]
    return statements, questions


_PLANTERS: dict[str, Callable[[random.Random, int, Split], Planted]] = {
    "kv": _kv,
    "facts": _facts,
    "chain": _chain,
    "labels": _labels,
}

_SENTENCE = re.compile(r"(?:(?<=^)|(?<=[.!?] ))[A-Z][^.!?\n]{60,190}[.!?](?=\s|$)")
_EXCERPT_WORDS = (8, 20)
_BEGINNING_WORDS = (5, 8)


def _excerpts(rng: random.Random, paragraphs: list[str], document: str) -> Iterator[Question]:
    """Quotations that occur once, from paragraphs in random order; the answer is the paragraph's number."""
    for i in rng.sample(range(len(paragraphs)), len(paragraphs)):
        words = rng.choice(paragraphs[i].split("\n")).split(" ")
        n = rng.randint(*_EXCERPT_WORDS)
        if len(words) < n:
            continue
        start = rng.randint(0, len(words) - n)
        excerpt = " ".join(words[start : start + n]).strip()
        if len(excerpt) > 30 and document.count(excerpt) == 1:
            yield Question("excerpt", excerpt_question(excerpt), f" {i + 1}")


def _copies(rng: random.Random, paragraphs: list[str], document: str) -> Iterator[Question]:
    """Whole sentences, so that the model can tell where the answer ends, whose beginning occurs once."""
    for i in rng.sample(range(len(paragraphs)), len(paragraphs)):
        sentences = _SENTENCE.findall(paragraphs[i])
        if not sentences:
            continue
        words = rng.choice(sentences).split(" ")
        n = rng.randint(*_BEGINNING_WORDS)
        if not all(words) or len(words) < n + 6:
            continue
        beginning, rest = " ".join(words[:n]), " ".join(words[n:])
        if document.count(beginning) == 1:
            yield Question("copy", copy_question(beginning), " " + rest)


# --------------------------------------------------------------------------------------------------- build


def parse_tasks(names: str) -> list[str]:
    """Task names of ``--tasks``."""
    return [name.strip() for name in names.split(",")]


def check_tasks(names: Sequence[str]) -> None:
    """``ConfigError`` for a name that is no task's, or that is there twice."""
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"no synthetic task {name!r}: expected some of {', '.join(TASKS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"--tasks {','.join(names)}: a value is given twice")


def build(
    rng: random.Random,
    paragraphs: Iterable[str],
    tasks: Mapping[str, int],
    *,
    length: int,
    count: Count,
    questions: int,
    split: Split = "train",
    together: bool = True,
) -> Sample:
    """Plant statements in natural text and ask about them.

    `tasks` maps a task to how many statements to plant (for `excerpt` and `copy`: how many questions at
    most). `paragraphs` is consumed from its start until the document is full. `length` bounds, as measured
    by `count` (a tokeniser's, or `len`), the document and *all* its questions and answers if `together`, as
    they stand in a row in training; otherwise the document and any one of them, as in evaluation. At most
    `questions` are asked, in random order. The same arguments give the same sample.

    No paragraph takes more than a quarter of the room; longer ones are passed over. Raises ValueError for an
    unknown task, for statements that need more room than there is, and where there is no end of long paragraphs.
    """
    if unknown := set(tasks) - set(TASKS):
        raise ValueError(f"tasks: expected some of {', '.join(TASKS)}, got {', '.join(sorted(unknown))}")
    statements: list[str] = []
    asked: list[Question] = []
    for task in TASKS:
        if task in _PLANTERS and task in tasks:
            planted, about = _PLANTERS[task](rng, tasks[task], split)
            statements += planted
            asked += about
    rng.shuffle(statements)
    rng.shuffle(asked)
    quoting = [task for task in ("excerpt", "copy") if task in tasks]
    asked = asked[: questions - min(len(quoting) * questions // 2, sum(tasks[t] for t in quoting))]

    def cost(q: Question) -> int:
        return count(q.question) + count(q.answer + BREAK)

    # Questions that quote the document can only be made once it stands; keep room for them.
    quote_cost = 3 * count(copy_question("word " * 16))
    costs = [cost(q) for q in asked] + [quote_cost] * min(questions - len(asked), sum(tasks[t] for t in quoting))
    planted_room = sum(count(s + BREAK) for s in statements)
    while together and costs and sum(costs) > min(length // 2, length - planted_room):
        costs.pop()  # a document first, then as many questions as fit
    room = length - (sum(costs) if together else max(costs, default=0))
    if planted_room > room:
        raise ValueError(f"length: expected at least {planted_room} for these statements, got {room}")
    natural: list[str] = []
    used, passed = planted_room, 0
    longest = max(64, (room - planted_room) // 4)  # one paragraph should not be the whole haystack
    numbered = "excerpt" in tasks
    for paragraph in paragraphs:
        if not paragraph.strip():
            continue
        size = count(paragraph + BREAK) + (count(paragraph_header(len(natural) + 1)) if numbered else 0)
        if size > longest:
            passed += 1
            if passed == PATIENCE:
                raise ValueError(f"paragraphs: expected some of at most {longest}, got {passed} longer ones in a row")
            continue
        passed = 0
        if used + size > room:
            break
        natural.append(paragraph)
        used += size

    # Statement i stands before paragraph slots[i]: anywhere in the document, its two ends included.
    slots = sorted(rng.randint(0, len(natural)) for _ in statements)
    segments: list[str] = []
    for i in range(len(natural) + 1):
        while slots and slots[0] == i:
            slots.pop(0)
            segments.append(statements.pop() + BREAK)
        if i < len(natural):
            if numbered:
                segments.append(paragraph_header(i + 1))
            segments.append(natural[i] + BREAK)
    document = "".join(segments)

    makers = {"excerpt": _excerpts, "copy": _copies}
    quotes = [q for t in quoting for q, _ in zip(makers[t](rng, natural, document), range(tasks[t]), strict=False)]
    rng.shuffle(quotes)
    asked = (asked + quotes)[:questions]
    rng.shuffle(asked)
    left = length - used
    kept: list[Question] = []
    for q in asked:
        size = cost(q)
        if size <= left:
            kept.append(q)
            left -= size if together else 0
    return Sample(tuple(segments), tuple(kept))
