"""The blockwise inverse of the empirical Fisher: blocks, gradient window, factors, saliencies and updates."""
