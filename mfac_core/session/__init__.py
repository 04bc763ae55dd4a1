"""What each adapter does: modifiers at work in a training run, and what they report."""
