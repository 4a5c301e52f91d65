"""Times single parts of a decoding step: one module and one ``attnpred bench`` command each."""
