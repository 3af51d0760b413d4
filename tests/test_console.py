"""What commands show on the screen."""

from solo.console import table, watched


def test_columns_hold_their_widest_cell_words_to_the_left_and_numbers_to_the_right():
    assert table("accuracy in %", ["features", "top-1"], [["pixels", "9.50"], ["trained", "100.00"]]).splitlines() == [
        "accuracy in %",
        "features   top-1",
        "----------------",
        "pixels      9.50",
        "trained   100.00",
    ]
    assert table("", ["", "train"], [["mean", "0.5"]], left=(0, 1)) == "      train\n-----------\nmean  0.5"


def test_what_is_watched_without_a_terminal_says_nothing(capsys):
    assert list(watched(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")
