"""Similarity of texts: baselines that show whether gradients add anything, and a filter.

    TfIdf        the TF-IDF score of Grosse et al.
    Bm25         Okapi BM25
    Embedding    the cosine of embeddings that the caller brings
    words        the words of a text, as the first two take them

All of it needs numpy only. A score is a similarity: nothing in it has seen a model, a loss or a
label. What is most similar is taken for the most helpful; there is no harmful side.

Gradients of a large corpus are costly. `candidates` names the few thousand examples for which they
are computed, or searched (Grosse et al., "Studying Large Language Model Generalization with
Influence Functions", arXiv 2308.03296, "TF-IDF filtering"). Such a filter biases what is found: an
example that shares no words with the query, as in another language or of the same idea in other
words, is never scored. Abstract influence stays hidden.
"""

from whence.text.baseline import Baseline
from whence.text.embedding import Embedding
from whence.text.lexical import Bm25, TfIdf
from whence.text.vocabulary import words

__all__ = ["Baseline", "Bm25", "Embedding", "TfIdf", "words"]
