"""What others do, written anew from its formulas, to be timed beside ours."""
