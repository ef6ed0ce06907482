"""One function per verb: a config in, a result out. Composes the layer below; prints nothing."""
