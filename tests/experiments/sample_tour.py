"""A tour of three sample studies, for the test that interrupts it."""

import sys

from experiments.common.study import Study
from experiments.tour import tour
from tests.experiments.sample_study import STUDY

if __name__ == "__main__":
    studies = [("sample", Study(**{**vars(STUDY), "name": name, "tour": True})) for name in ("one", "two", "three")]
    tour.all_studies = lambda: studies
    tour.module_of = lambda family: "tests.experiments.sample_study"
    sys.exit(tour.main(sys.argv[1:]))
