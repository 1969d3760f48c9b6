"""Distribution-wise rewards: what a few pictures do to the distance of all pictures to real ones.

One picture has no FID; a set has. Subset-replace (arXiv 2607.02291, section 3.2) keeps a reference
of M generated pictures, puts K new ones in the place of K old ones, and rewards the K by what that
does to the FID of all M. The bias of the FID, large for few pictures, is that of M pictures before
and after, and cancels.

    FID = |mu - m|^2 + Tr(S + C - 2 (S C)^(1/2))                              (arXiv 1706.08500)

N(mu, S) is fitted to generated features, N(m, C) to real ones. With R = C^(1/2), the trace of
(S C)^(1/2) is the sum of the square roots of the eigenvalues of R S R, which is symmetric.

In the paper the reward is minus the FID after the replacement, one number for a set of K = 50, and
each set replaces random members of its own. Ours: the fall of the FID (the same once centred);
rival sets replace the same members; an exact price from a low-rank change of the eigenvalues; one
price for each picture, the Kantorovich potential; KID (arXiv 1801.01401) by the same interface.
Left out on purpose: feature networks and real pictures, which are in rewards/.
"""

import math

import torch

# Where a price divides by the root of an eigenvalue, the eigenvalue counts as at least this
# fraction of the largest.
DAMPING = 1e-6

# Shapes: M generated features in the reference, D numbers in a feature, G rival sets,
#         K pictures in a set, P groups of N rollouts.


# --------------------------------------------------------------------------------------------------
# The Frechet distance.


def moments(features, shard=4096):
    """features [M, D] -> mu [D] and the unbiased covariance sigma [D, D], in float64."""
    M, D = features.shape
    mu = sum(part.double().sum(0) for part in features.split(shard)) / M
    sigma = torch.zeros(D, D, dtype=torch.float64, device=features.device)
    for part in features.split(shard):
        centred = part.double() - mu
        sigma += centred.T @ centred
    return mu, sigma / (M - 1)


def sqrt_psd(matrix):
    """The symmetric square root of a positive semi-definite matrix [D, D], float64.

    Eigenvalues below 0 come from rounding and count as 0.
    """
    eigenvalues, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T


def frechet(shift, sigma, root, trace_real, eigenvalues=None):
    """The squared Frechet distance to real moments whose root and trace are known -> float, >= 0.

    shift [D] is mu - m, sigma [D, D] is S, root [D, D] is R = C^(1/2), trace_real is Tr C.
    eigenvalues [D]: those of R S R, if they have been computed before.
    """
    if eigenvalues is None:
        eigenvalues = torch.linalg.eigvalsh(root @ sigma @ root).clamp(min=0)
    trace_root = eigenvalues.sqrt().sum()
    distance = shift.square().sum() + sigma.trace() + trace_real - 2 * trace_root
    return max(0.0, float(distance))


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of N(mu1, sigma1) and N(mu2, sigma2) -> float, never negative.

    Tensors or arrays mu [D] and sigma [D, D]. With moments of M pictures it is biased upward:
    compare at equal M.

    >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2))
    4.0

    which is |1 - 0|^2 + (2 - 1)^2 in each of the two dimensions.
    """
    mu1 = torch.as_tensor(mu1).double()
    mu2 = torch.as_tensor(mu2).double()
    sigma1 = torch.as_tensor(sigma1).double()
    sigma2 = torch.as_tensor(sigma2).double()
    return frechet(mu1 - mu2, sigma1, sqrt_psd(sigma2), sigma2.trace())


def trace_root_change(eigenvalues, rows, core):
    """Tr (L + Z^T C Z)^(1/2) - Tr L^(1/2) for each of G changes -> [G], relative error about 1e-8.

    L = diag(eigenvalues [D]), Z = rows [G, r, D], C = core [r, r].

    Take x^(1/2) = 1/pi int_0^inf x / (x + s) s^(-1/2) ds, integrate by parts, and use the
    determinant lemma for the low rank r:
        change = 1/(2 pi) int_0^inf s^(-1/2) log det(I + C Z (L + s)^(-1) Z^T) ds.
    With s = e^u the integrand is analytic in a strip of half-width pi, so the plain sum over
    u = ..., 0, 1, 2, ... has an error of e^(-2 pi^2). The cost is O(D r^2) for each of about 90 u;
    from r = D/4 on, computing all eigenvalues again in O(D^3) is as fast.
    """
    G, r, D = rows.shape
    if 4 * r > D:
        changed = torch.diag(eigenvalues) + rows.transpose(1, 2) @ core @ rows  # [G, D, D]
        roots = torch.linalg.eigvalsh(changed).clamp(min=0).sqrt()
        return roots.sum(1) - eigenvalues.sqrt().sum()

    # u ends beyond every eigenvalue, before and after: a change may exceed all that it changes.
    size_of_change = rows.square().sum((1, 2)).max() * core.norm()
    largest = torch.maximum(eigenvalues.max(), size_of_change).clamp(min=1e-300)
    top = largest.log().item()
    u = torch.arange(
        math.floor(top) - 50,
        math.ceil(top) + 40,
        dtype=eigenvalues.dtype,
        device=eigenvalues.device,
    )

    identity = torch.eye(r, dtype=rows.dtype, device=rows.device)
    at_once = max(1, 2**24 // rows.numel())  # values of s, for memory only
    change = 0
    for s in u.exp().split(at_once):
        shifted = eigenvalues + s[:, None, None, None]  # [s, 1, 1, D]
        resolvent = (rows / shifted) @ rows.transpose(1, 2)  # [s, G, r, r]
        log_det = torch.linalg.slogdet(identity + core @ resolvent).logabsdet  # [s, G]
        # Rounding can lose I and leave a determinant of 0, but only where s^(1/2) is negligible.
        log_det = log_det.nan_to_num(neginf=0.0)
        integrand = s.sqrt()[:, None] * log_det
        change = change + integrand.sum(0) / (2 * math.pi)
    return change


# --------------------------------------------------------------------------------------------------
# FID: subset-replace.


def check_price(how):
    """Raises ValueError unless `how` names a price."""
    if how not in ("exact", "potential"):
        raise ValueError(f"how={how!r} is not a price; give exact or potential")


class SubsetReplace:
    """A reference of M generated features, its FID, and the price of replacing some of its members.

    reference [M, D]; mu_real [D] and sigma_real [D, D] of the real features. A price is a reward:
    positive when the FID falls. Features are kept in float32. Their sums are kept in float64 and
    about mu_real, so that little cancels.

    Why one picture has a price. As a function of the generated distribution p, the FID is the
    squared Wasserstein distance of two Gaussians. By duality it is the maximum over pairs
    (phi, psi) of E_p phi + E_real psi, and at the maximum a small change dp changes it by
    int phi dp alone (envelope theorem). So its derivative is phi, the Kantorovich potential.
    Between Gaussians the optimal map sends f to m + T (f - mu) with T = R (R S R)^(-1/2) R, the
    gradient of phi at f is twice f minus that, and so
        phi(f) = 2 (mu - m).(f - mu) + (f - mu)^T (I - T) (f - mu).
    Replacing f_old by f_new moves 1/M of p: its price is -(phi(f_new) - phi(f_old)) / M.

    Where this first order fails: the FID is convex in S, so summed over many pictures it promises
    too much; and where S has no variance, T is infinite, so eigenvalues are floored (DAMPING) and
    the potential is then a direction, not a size. The exact price has neither limit. There is no
    second order: it has the wrong sign where members are few, and was never the best of the three.

    >>> generator = torch.Generator().manual_seed(0)
    >>> far = torch.randn(100, 2, generator=generator) + 2
    >>> pool = SubsetReplace(far, torch.zeros(2), torch.eye(2))
    >>> distances = [pool.fid()]
    >>> for members in torch.arange(100).split(25):
    ...     pool.replace(members, torch.randn(25, 2, generator=generator))  # like the real ones
    ...     distances.append(pool.fid())
    >>> [round(distance) for distance in distances]
    [8, 5, 2, 1, 0]
    >>> good, bad = pool.price(torch.tensor([[[0.1, 0.0]], [[5.0, 5.0]]]), torch.tensor([0]))
    >>> bool(good > bad)
    True
    """

    def __init__(self, reference, mu_real, sigma_real):
        sigma_real = torch.as_tensor(sigma_real, device=reference.device).double()
        self.mu_real = torch.as_tensor(mu_real, device=reference.device).double()
        self.root = sqrt_psd(sigma_real)  # R
        self.trace_real = sigma_real.trace()
        self.features = reference.float().clone()  # [M, D]
        self.sums = self.compute_sums()
        self.spectrum = None  # of R S R; computed when needed, dropped when a member changes

    def compute_sums(self):
        """sum x [D] and sum x x^T [D, D] over the members x = feature - mu_real, float64."""
        total = torch.zeros_like(self.mu_real)
        squares = torch.zeros_like(self.root)
        for part in self.features.split(4096):
            x = part.double() - self.mu_real
            total += x.sum(0)
            squares += x.T @ x
        return total, squares

    def shift(self):
        """mu - mu_real [D]: the mean of the reference, seen from the mean of the real features."""
        total, _ = self.sums
        return total / len(self.features)

    def moments(self):
        """-> mu - mu_real [D] and the unbiased covariance [D, D] of the reference."""
        M = len(self.features)
        _, squares = self.sums
        shift = self.shift()
        return shift, (squares - M * torch.outer(shift, shift)) / (M - 1)

    def decomposed(self):
        """-> eigenvalues [D] of R S R = U diag(eigenvalues) U^T, and the basis R U [D, D].

        A change x^T x of S, x [rows, D], is the change (x R U)^T (x R U) of diag(eigenvalues).
        """
        if self.spectrum is None:
            _, sigma = self.moments()
            eigenvalues, vectors = torch.linalg.eigh(self.root @ sigma @ self.root)
            self.spectrum = eigenvalues.clamp(min=0), self.root @ vectors
        return self.spectrum

    def fid(self):
        """The FID of the reference -> float."""
        shift, sigma = self.moments()
        eigenvalues, _ = self.decomposed()
        return frechet(shift, sigma, self.root, self.trace_real, eigenvalues)

    value = fid  # its name in both classes

    def price(self, new, replaced, how="exact"):
        """The reward of putting new [G, K, D] in the place of the members `replaced` [K], float64.

        how="exact": the fall of the FID, one number for each of G sets -> [G].
        how="potential": first order, one number for each picture -> [G, K].
        Raises ValueError for another `how`. Nothing is replaced.
        """
        check_price(how)
        new = self.centred(new)
        old = self.centred(self.features[replaced])
        if how == "exact":
            return -self.exact_change(new, old)
        return -(self.potential(new) - self.potential(old)) / len(self.features)

    def centred(self, features):
        """f - mu for features f [..., D], float64."""
        return features.double() - self.mu_real - self.shift()

    def potential(self, x):
        """phi of the class docstring: x = f - mu [..., D] -> [...]."""
        eigenvalues, basis = self.decomposed()
        # All eigenvalues are 0 if the reference has no variance.
        floor = max(DAMPING * eigenvalues.max().item(), 1e-60)
        roots = eigenvalues.clamp(min=floor).sqrt()
        mapped = ((x @ basis).square() / roots).sum(-1)  # x^T T x
        return 2 * x @ self.shift() + x.square().sum(-1) - mapped

    def exact_change(self, new, old):
        """The rise of the FID when new [G, K, D] replace old [K, D], both about the mean -> [G]."""
        M = len(self.features)
        G, K, D = new.shape
        eigenvalues, basis = self.decomposed()

        # The mean moves by step = (sum of new - sum of old) / M.
        scaled_step = (new.sum(1) - old.sum(0)) / math.sqrt(M)  # [G, D], sqrt(M) step
        step = scaled_step / math.sqrt(M)
        before = self.shift()
        after = before + step
        mean_change = after.square().sum(1) - before.square().sum()

        # The covariance changes by dS = (new^T new - old^T old - M step^T step) / (M - 1).
        come = new.square().sum((1, 2))
        go = old.square().sum()
        trace_change = (come - go - scaled_step.square().sum(1)) / (M - 1)

        # dS = Z^T C Z with the 2K rows Z = [new, old]: step is a combination of them, too.
        sign = torch.cat([torch.ones(K), -torch.ones(K)]).to(new)
        of_step = torch.outer(sign, sign) / M
        core = (torch.diag(sign) - of_step) / (M - 1)  # C
        rows = torch.cat([new, old.expand(G, K, D)], 1)  # Z
        root_change = trace_root_change(eigenvalues, rows @ basis, core)

        return mean_change + trace_change - 2 * root_change

    def replace(self, index, new):
        """Members index [K] become new [K, D]; the sums follow."""
        old = self.features[index]
        self.features[index] = new.float()
        total, squares = self.sums
        # The float32 values that are kept are the ones that are summed, so that nothing drifts.
        for sign, part in ((1, self.features[index]), (-1, old)):
            x = part.double() - self.mu_real
            total.add_(sign * x.sum(0))
            squares.add_(sign * (x.T @ x))
        self.spectrum = None

    def refresh(self, reference=None):
        """Recomputes the sums -> how far they had drifted by rounding, relative to their size.

        reference [M, D]: new members in the place of all, after the drift has been computed.
        """
        fresh_sums = self.compute_sums()
        drifts = []
        for kept, fresh in zip(self.sums, fresh_sums):
            drift = (kept - fresh).norm() / fresh.norm().clamp(min=1e-300)
            drifts.append(drift.item())

        if reference is not None:
            self.features.copy_(reference)
            fresh_sums = self.compute_sums()
        for kept, fresh in zip(self.sums, fresh_sums):
            kept.copy_(fresh)
        self.spectrum = None
        return max(drifts)

    def state(self):
        """The tensors that a checkpoint holds; to resume, copy the saved ones into these, in place.

        Do so before the first fid or price of this object.
        """
        first, second = self.sums
        return {
            "reference.features": self.features,
            "reference.sums.0": first,
            "reference.sums.1": second,
        }


# --------------------------------------------------------------------------------------------------
# KID: the same with a kernel.


def polynomial_kernel(x, y):
    """KID's kernel k(x, y) = (x.y / D + 1)^3: x [A, D], y [B, D] -> [A, B], float64."""
    return (x.double() @ y.double().T / x.shape[-1] + 1) ** 3


def kernel_sums(x, y, shard=4096):
    """The sum over y of k(x, y), for each x: x [A, D], y [B, D] -> [A], float64."""
    return sum(polynomial_kernel(x, part).sum(1) for part in y.split(shard))


def own_kernel(x):
    """k(x, x) for each row: x [A, D] -> [A]. An unbiased mean over pairs leaves these out."""
    return (x.double().square().sum(-1) / x.shape[-1] + 1) ** 3


def sum_of_pairs(x):
    """The sum of k over all ordered pairs of two different rows of x [A, D]."""
    return polynomial_kernel(x, x).sum() - own_kernel(x).sum()


class KernelReplace:
    """As SubsetReplace, for KID: the unbiased squared MMD with the cubic kernel (arXiv 1801.01401).

    It needs the real features [R, D], not their moments. KID is quadratic in the generated
    distribution, and its potential is the witness function
        phi(f) = 2 (mean over generated x of k(f, x) - mean over real y of k(f, y)).
    """

    def __init__(self, reference, real):
        self.features = reference.float().clone()  # [M, D]
        self.real = real.float()  # [R, D]
        R = len(real)
        real_sums = kernel_sums(self.real, self.real) - own_kernel(self.real)
        self.real_term = real_sums.sum() / (R * (R - 1))
        self.sums = self.compute_sums()

    def compute_sums(self):
        """-> for each member x: the sum of k(x, .) over all members, x included [M]; the mean of
        k(x, .) over the real ones [M].
        """
        among = kernel_sums(self.features, self.features)
        to_real = kernel_sums(self.features, self.real) / len(self.real)
        return among, to_real

    # Both need no more than `features`, `sums` and `compute_sums`.
    refresh = SubsetReplace.refresh
    state = SubsetReplace.state

    def value(self):
        """The KID of the reference -> float; it may be negative, for it is unbiased."""
        M = len(self.features)
        among, to_real = self.sums
        generated_sums = among - own_kernel(self.features)
        generated_term = generated_sums.sum() / (M * (M - 1))
        return float(generated_term + self.real_term - 2 * to_real.mean())

    def price(self, new, replaced, how="exact"):
        """As SubsetReplace.price: new [G, K, D], replaced [K] -> [G], or [G, K] for potential."""
        check_price(how)
        M = len(self.features)
        G, K, D = new.shape
        among, to_real = self.sums
        new = new.float()
        rows = new.reshape(-1, D)
        new_among = kernel_sums(rows, self.features).reshape(G, K)
        new_to_real = kernel_sums(rows, self.real).reshape(G, K) / len(self.real)
        if how == "potential":
            phi_new = 2 * (new_among / M - new_to_real)
            phi_old = 2 * (among[replaced] / M - to_real[replaced])
            return -(phi_new - phi_old) / M

        # Ordered pairs of two different members: those that come with new, those that go with old.
        old = self.features[replaced]
        with_old = torch.stack([polynomial_kernel(x, old).sum() for x in new])
        with_new = torch.stack([sum_of_pairs(x) for x in new])
        come = 2 * (new_among.sum(1) - with_old) + with_new
        go = 2 * (among[replaced] - own_kernel(old)).sum() - sum_of_pairs(old)
        generated_change = (come - go) / (M * (M - 1))
        to_real_change = new_to_real.sum(1) - to_real[replaced].sum()
        return -(generated_change - 2 * to_real_change / M)

    def replace(self, index, new):
        """Members index [K] become new [K, D]; the sums follow."""
        old = self.features[index]
        new = new.float()
        among, to_real = self.sums
        among += kernel_sums(self.features, new) - kernel_sums(self.features, old)
        self.features[index] = new
        among[index] = kernel_sums(new, self.features)
        to_real[index] = kernel_sums(new, self.real) / len(self.real)


# --------------------------------------------------------------------------------------------------
# The rewards of one iteration's rollouts.


def price_groups(pool, new, oldest, how="potential", replace=0):
    """The reward of every rollout of P groups: features new [P, N, D] -> [P, N].

    pool is a SubsetReplace or a KernelReplace, `oldest` the number of its oldest member. A set is
    K = `replace` pictures of K different groups (0: of all P), so its N rivals have the same
    prompts. They are priced against the same K members, the oldest, and each picture of a set gets
    a K-th of its price. With how="potential" each picture gets its own price.
    In units of the distance: what it would fall by, to first order, if all M members changed like
    this. Raises ValueError if K does not divide P.
    """
    P, N, D = new.shape
    M = len(pool.features)
    K = replace or P
    if P % K:
        raise ValueError(f"sets of {K} pictures do not divide {P} groups")

    rewards = []
    for block, part in enumerate(new.split(K)):  # [K, N, D]
        first = oldest + block * K
        members = (first + torch.arange(K, device=new.device)) % M
        price = M * pool.price(part.transpose(0, 1), members, how)
        if how == "potential":
            rewards.append(price.T)
        else:
            rewards.append((price / K).expand(K, N))
    return torch.cat(rewards)
