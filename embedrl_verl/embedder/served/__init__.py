# SPDX-License-Identifier: Apache-2.0
"""The Embedder behind HTTP: rows as requests to stock vLLM pooling servers, and such servers started and watched.

- `requests`: a row as a chat request of /v1/embeddings, and the vector in its answer;
- `client`: sends them; `handshake`: proves that a server reads exactly our prompts;
- `command`: the arguments that such a server needs;
- `guard`, `process`, `fleet`: a server as a child process, watched and restarted, one to a Ray actor.
"""
