"""Thousands of distinct words: compounds of two plain words."""

from __future__ import annotations

import random
from collections.abc import Iterator


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words("""
    apple arrow autumn badger barley basket beacon birch blanket bottle bramble bread brick bridge bronze butter candle
    canyon carpet castle cedar chalk cherry chimney cinder clay clover cobalt copper coral cotton cradle cricket crystal
    daisy desert dragon drift eagle ember falcon feather fiddle forest fountain frost garden garnet ginger glacier
    granite grass harbor harvest hazel heather hollow honey iron island ivory jasmine juniper kettle kitchen ladder
    lantern laurel lemon lilac linen lobster maple marble market meadow midnight mirror morning mountain nettle nutmeg
    ocean olive onyx orchard otter oyster paper parrot pebble pepper pigeon pillow plaster pocket poplar prairie
    quarry rabbit raven ribbon river rocket rose saffron salmon sand shadow shell silver snow spruce sugar summer
    sunset tanner thistle thunder timber tulip turtle valley velvet violet walnut water willow winter wolf
""")
_SECOND = _words("""
    anchor arch barn beam bell bench bloom board bolt bowl box branch brook brush cap cart chest cliff cloak cloth
    coat comb cove crest cross crown cup dance dock door dove drum dust fall fence fern field fire flag flame flock
    flute foot fork gate glass glove grove guard hall hammer hand harp hat hawk hearth helm hill hook horn horse
    house hut jar joint keel keep key kite knot lace lake lamp lane leaf lock loft mast mill mist moon moss mouse
    nest net oar path pine pipe plant plate plough pond pool post rain rake reed ridge ring road rock roof root rope
    sail saw seed shade shelf ship shoe shore song spark spear spoon spring stage stair star step stone storm stove
    stream sword table tail thorn thread throne tide tower track trail trap tree trunk tub vale vine wagon wall watch
    wave weed well wheel wind wing wood yard yarn
""")


COMPOUNDS = len(_FIRST) * len(_SECOND)


def compounds(rng: random.Random, joint: str = "") -> Iterator[str]:
    """Distinct compounds in random order, such as ``riverstone``; ``joint`` joins their halves."""
    for number in rng.sample(range(COMPOUNDS), COMPOUNDS):
        yield _FIRST[number // len(_SECOND)] + joint + _SECOND[number % len(_SECOND)]
