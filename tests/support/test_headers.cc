// Nothing: for the precompiled header beside it.
