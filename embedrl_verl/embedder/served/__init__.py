# SPDX-License-Identifier: Apache-2.0
"""The Embedder behind HTTP: rows as requests to stock vLLM pooling servers, and such servers started and watched.

- `requests`: a row as a chat request of /v1/embeddings, and the vector in its answer;
- `client`: sends them, and proves before the first step that a server reads exactly our prompts;
- `command`: the arguments that such a server needs; `plain_input`: what makes it read bare texts with the prompt;
- `servers`: servers of a run, each in a Ray actor; `guard`: ends them with their owner.
"""
