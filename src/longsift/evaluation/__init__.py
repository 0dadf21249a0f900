"""Does a score see long-range dependency? Paired controls, their AUC, needles, and loss by position."""
