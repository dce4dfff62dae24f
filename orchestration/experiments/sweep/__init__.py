"""Many runs of one experiment over a space of its settings, under Ray Tune. The page is ``loop``."""
