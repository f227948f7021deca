//! Every failpoint in the source is reached by an operation: none is dead.
