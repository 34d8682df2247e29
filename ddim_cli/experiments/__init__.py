"""The paper's experiments, each a use of sampling."""
