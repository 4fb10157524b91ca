#version 450
// Which (token, used) pairs meet which expert: a workgroup finds those of one expert. Their order does not matter, as
// each has a result of its own.
layout(local_size_x = 128) in;

layout(push_constant) uniform parameters {
    uint n_expert;
    uint n_pairs;
    uint n_used;
    uint ids_first;
    uint ids_stride;  // distance of two tokens
} p;

layout(binding = 0) readonly buffer I { uint ids[]; };
// [n_expert][2]: where an expert's pairs begin, how many it has; then the pairs
layout(binding = 1) writeonly buffer R { uint routing[]; };

shared uint before, found;

uint expert_of(uint pair) {
    return ids[p.ids_first + pair / p.n_used * p.ids_stride + pair % p.n_used];
}

void main() {
    const uint thread = gl_LocalInvocationIndex, expert = gl_WorkGroupID.x;
    if (thread == 0) {
        before = found = 0;
    }
    barrier();
    uint earlier = 0;
    for (uint pair = thread; pair < p.n_pairs; pair += 128) {
        earlier += expert_of(pair) < expert ? 1 : 0;
    }
    atomicAdd(before, earlier);
    barrier();
    for (uint pair = thread; pair < p.n_pairs; pair += 128) {
        if (expert_of(pair) == expert) {
            routing[2 * p.n_expert + before + atomicAdd(found, 1)] = pair;
        }
    }
    barrier();
    if (thread == 0) {
        routing[2 * expert] = before;
        routing[2 * expert + 1] = found;
    }
}
