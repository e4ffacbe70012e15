"""What each figure of a probe report means, in one sentence, and its range."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Meaning:
    """``title`` for a table, ``range`` and which end is better, ``text`` in one sentence."""

    title: str
    range: str
    text: str


#: By probe and figure.
MEANINGS: dict[str, dict[str, Meaning]] = {
    "overview": {
        "active_units": Meaning(
            "active units", "0 to latent size", "dimensions whose posterior mean varies by 0.01 or more"
        ),
        "kl": Meaning(
            "KL", "0 and up, nats", "what a sentence's latent says beyond the prior; 0 is a collapsed posterior"
        ),
        "effective_dimensions": Meaning(
            "effective dimensions", "1 to latent size", "directions over which the variance of the latents is spread"
        ),
    },
    "disentanglement": {
        "mig": Meaning(
            "MIG", "0 to 1, higher", "by how much the best dimension tells more of a factor than the second best"
        ),
        "modularity": Meaning(
            "modularity", "0 to 1, higher", "whether each dimension tells one factor only; noise alone scores about 2/3"
        ),
        "explicitness": Meaning(
            "explicitness",
            "0.5 to 1, higher",
            "how well a linear classifier reads the factors off the whole latent (AUC)",
        ),
        "sap": Meaning(
            "SAP", "0 to 1, higher", "how much better one dimension alone predicts a factor than the next (accuracy)"
        ),
        "sap_continuous": Meaning(
            "SAP, correlation",
            "0 to 1, higher",
            "the same by squared correlation; only for factors whose values are ordered",
        ),
        "dci_disentanglement": Meaning(
            "DCI disentanglement", "0 to 1, higher", "whether each important dimension helps to predict one factor only"
        ),
        "dci_completeness": Meaning(
            "DCI completeness", "0 to 1, higher", "whether each factor is told by one dimension only"
        ),
        "dci_informativeness": Meaning(
            "DCI informativeness", "0 to 1, higher", "how well boosted trees predict the factors (test accuracy)"
        ),
        "z_diff": Meaning(
            "z-diff", "1/factors to 1, higher", "whether pairs that share a factor show which one by their differences"
        ),
        "z_min_var": Meaning(
            "z-min-var",
            "1/factors to 1, higher",
            "whether the dimension that varies least in a group names the shared factor",
        ),
    },
    "clusters": {
        "silhouette": Meaning(
            "silhouette", "-1 to 1, higher", "whether sentences lie nearer to their own value than to others"
        ),
        "knn": Meaning("5 nearest", "0 to 1, higher", "accuracy of a vote of the five nearest sentences"),
        "ari": Meaning("k-means ARI", "0 (chance) to 1, higher", "whether k-means finds the values by itself"),
        "calinski_harabasz": Meaning(
            "Calinski-Harabasz", "0 and up, higher", "spread between the values over spread within them"
        ),
        "davies_bouldin": Meaning(
            "Davies-Bouldin", "0 and up, lower", "spread within two values over how far apart they are, at its worst"
        ),
        "nmi": Meaning("k-means NMI", "0 to 1, higher", "what k-means' clusters tell of the values"),
        "neighbours alike": Meaning(
            "neighbours alike", "0 to 1, higher", "share of the five nearest that have the same value"
        ),
    },
    "maps": {
        f"{method}_trustworthiness": Meaning(
            f"{title} trustworthiness",
            "0.5 to 1, higher",
            "whether points near in the picture are near in the latent too",
        )
        for method, title in (("pca", "PCA"), ("tsne", "t-SNE"), ("umap", "UMAP"))
    },
    "neighbourhoods": {
        "kept_neighbours": Meaning(
            "kept neighbours",
            "0 to 1, higher",
            "share of the ten nearest by the encoder's vectors that are nearest in the latent",
        ),
    },
    "reconstruction": {
        "bleu": Meaning("BLEU", "0 to 100, higher", "n-grams of the decoded sentences that are in the originals"),
        "chrf": Meaning("chrF", "0 to 100, higher", "the same over characters"),
        "ter": Meaning("TER", "0 and up, lower", "edits needed for each hundred words"),
        "exact_match": Meaning("exact", "0 to 1, higher", "sentences that come back word for word"),
        "token_accuracy": Meaning("words in place", "0 to 1, higher", "words that stand where they should"),
        "sentence_bleu": Meaning("sentence BLEU", "0 to 100, higher", "smoothed BLEU of each sentence, their mean"),
    },
    "generation": {
        "self_bleu": Meaning("self-BLEU", "0 to 1, lower", "how alike the draws are among themselves"),
        "distinct_1": Meaning("distinct-1", "0 to 1, higher", "different words among all words of the draws"),
        "distinct_2": Meaning("distinct-2", "0 to 1, higher", "different pairs of words"),
        "distinct_3": Meaning("distinct-3", "0 to 1, higher", "different triples of words"),
        "distinct_4": Meaning("distinct-4", "0 to 1, higher", "different runs of four words"),
        "frechet_distance": Meaning(
            "Frechet distance", "0 and up, lower", "distance of draws and data as clouds of the encoder's vectors"
        ),
        "mauve": Meaning("MAUVE", "0 to 1, higher", "overlap of draws and data as clusters of the encoder's vectors"),
    },
    "interpolation": {
        "smoothness": Meaning(
            "smoothness (IS)",
            "0 to 1, higher",
            "straight way by way taken, in word mover's distance; unrelated steps give about 1/T",
        ),
    },
    "traversal": {
        "texts_that_differ": Meaning(
            "texts that differ", "1/steps to 1", "how often moving one dimension changes the sentence"
        ),
    },
    "sts": {
        "spearman_latent": Meaning(
            "Spearman, latent",
            "-100 to 100, higher",
            "whether similar sentences have similar latents, as people see it",
        ),
        "spearman_encoder": Meaning(
            "Spearman, encoder", "-100 to 100, higher", "the same for the encoder's own vectors: the ceiling"
        ),
        "share_kept": Meaning("share kept", "1 is the ceiling", "what the bottleneck leaves of the encoder's figure"),
    },
    "linguistic": {
        "latent": Meaning("latent", "0 to 1, higher", "accuracy of a linear classifier on the posterior mean"),
        "encoder": Meaning("encoder", "0 to 1, higher", "the same on the encoder's own vectors: the ceiling"),
    },
}

#: A sentence on each probe, for its heading.
HEADINGS: dict[str, tuple[str, str]] = {
    "overview": ("The latent in use", "How many dimensions carry something, and how much."),
    "disentanglement": ("Disentanglement", "Which dimension tells which factor of the sentences."),
    "clusters": ("Clusters", "How far the values of a factor lie apart, in all dimensions of the latent."),
    "maps": ("Maps", "The whole latent brought down to two dimensions."),
    "neighbourhoods": ("Neighbourhoods", "What the bottleneck keeps of which sentences are near which."),
    "reconstruction": ("Reconstruction", "Sentences encoded, then decoded greedily."),
    "generation": ("Draws from the prior", "Latents drawn from N(0, I), decoded greedily."),
    "interpolation": ("Interpolation", "The line between two latents, decoded point by point."),
    "traversal": ("Traversal", "One sentence while single dimensions of its latent move."),
    "sts": ("Similarity", "Cosine of two latents against the similarity that people see."),
    "linguistic": (
        "Linguistic probing",
        "What a linear classifier reads off the latent, beside the encoder's own vectors.",
    ),
}


def meaning(probe: str, figure: str) -> Meaning:
    """Of a figure; those of many factors or tasks go by the part of their name that is common to all."""
    known = MEANINGS.get(probe, {})
    if figure in known:
        return known[figure]
    for part in (figure.rpartition(": ")[2], figure.partition("_")[2]):
        if part in known:
            return Meaning(figure.replace("_", " "), known[part].range, known[part].text)
    return Meaning(figure.replace("_", " "), "", "")
