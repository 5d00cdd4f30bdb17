"""The tables and figures of AmoebaLLM (Fu et al., NeurIPS 2024, arXiv 2411.10606), each by one command."""
