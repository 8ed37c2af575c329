// Trees that never draw a sequence twice: Gumbel-top-k over whole responses, followed token by
// token (arXiv:1903.06059; its ancestral form, JMLR 21(47), 2020).
//
// A node is the prefix that a branch has drawn. Its log-mass is the sum of the log-probs of its
// tokens in the distribution that is drawn from; its Gumbel number is the largest perturbed
// log-mass of all sequences below it. The node's next token is an ordinary draw and inherits that
// number; the best of all other continuations has a smaller one, of which the law is known. A
// question keeps the `votes` nodes of the largest numbers, open branches and leaves alike; what
// they stand for is the top of all sequences, whatever order the branches are stepped in.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "tree/forest.h"

namespace pyrl::tree {

// The last token of each of B distinct branches, in the distribution that it was drawn from.
struct Draws {
  std::span<const std::int64_t> branch;
  std::span<const float> logprob;  // of the token
  std::span<const float> rest;     // log of the mass that is neither its nor of earlier siblings
};

struct Growth {
  // A sibling opens before the last token of each of these, to draw from the rest.
  std::vector<std::int64_t> parent;
  std::vector<double> log_mass, gumbel;  // of the sibling, to be handed to `Forest::stand`
  std::vector<std::int64_t> dropped;     // branches, open or finished, that are no longer kept
};

// New trunks, one to a tree, draw their Gumbel numbers from their seeds.
void draw_roots(Forest& forest, std::span<const std::int64_t> trunk);
// Moves the nodes on by the tokens that `Forest::append` has just taken, and decides for each of
// them whether the best other continuation is kept. Raises what is refused (`Forest::refused`).
Growth grow(Forest& forest, std::int64_t votes, const Draws& draws);
// Sets the weight of each leaf of all trees: exp(log-mass) over the probability of being kept, in
// sum 1 over a tree; a closed tree's leaves weigh what their masses do.
void weigh(Forest& forest);

}  // namespace pyrl::tree
