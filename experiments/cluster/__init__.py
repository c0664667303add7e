"""Planning for clusters that are not at hand: which folding to launch, what it will cost, what bounds it."""
