"""Tables for people show names as they are: a stranger's brackets are no markup."""

from io import StringIO

import numpy as np
from reference import make_tiny
from rich.console import Console

from speeder_engine import Ranking
from speeder_engine.catalogue import Catalogue, ItemTable
from speeder_engine.inspection import inspect_engine
from speeder_engine.tables import recommendation_table, summary_table

NAME = "a[/]b[bold]c"


def printed(table):
    console = Console(width=200, record=True, file=StringIO())
    console.print(table)
    return console.export_text()


def test_a_directory_is_named_as_it_is(tmp_path):
    make_tiny(num_layers=1).parts().save(tmp_path / NAME)
    assert str(tmp_path / NAME) in printed(summary_table(inspect_engine(tmp_path / NAME)))


def test_users_and_titles_are_named_as_they_are():
    tokens = make_tiny(num_layers=1, num_items=2).tokens
    catalogue = Catalogue(ItemTable.fresh(["x", "y"], [f"{NAME} 1", f"{NAME} 2"], np.zeros(2, np.float32)), tokens)
    text = printed(recommendation_table(f"user {NAME}", ["x"], Ranking(("y",), (0.5,)), catalogue))
    assert all(each in text for each in (f"user {NAME}", f"{NAME} 1", f"{NAME} 2"))
