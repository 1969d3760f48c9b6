"""Distribution-wise rewards: what a few pictures do to the distance between all generated and all real pictures (arXiv 2607.02291).

FID (arXiv 1706.08500): |mu - m|^2 + Tr(S + C - 2 (S C)^(1/2)) between N(mu, S), generated, and N(m, C), real. With R = C^(1/2),
Tr (S C)^(1/2) is the sum of the square roots of the eigenvalues l of A = R S R = U diag(l) U^T: no general matrix root, singular or not.
Subset-replace: a reference of M generated features; K new ones take the place of K old ones; reward = distance before - distance after.
A plain FID of K pictures is swamped by its bias at small K; here M stays, so the bias cancels. KID (arXiv 1801.01401) by the same interface.
What pictures are measured by (--features) and against (--target) is in features.py.
"""
import math
import torch

DAMPING = 1e-6                                                           # floor of an eigenvalue, of the largest, where it divides


def moments(features, shard=4096):
    """features [M, D] -> mu [D], sigma [D, D] in float64, in shards; the covariance is divided by M - 1."""
    M, D = features.shape
    mu = sum(part.double().sum(0) for part in features.split(shard)) / M
    sigma = torch.zeros(D, D, dtype=torch.float64, device=features.device)
    for part in features.split(shard):
        x = part.double() - mu
        sigma += x.T @ x
    return mu, sigma / (M - 1)


def sqrt_psd(matrix):
    """The symmetric square root of a positive semi-definite matrix, float64; eigenvalues below 0 are rounding, and taken as 0."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """The squared Frechet distance of N(mu1, sigma1) and N(mu2, sigma2) -> float, never negative. Biased upward at finite M: compare equal M.

    >>> frechet_distance(torch.zeros(2), torch.eye(2), torch.ones(2), 4 * torch.eye(2))          # |1 - 0|^2 + (2 - 1)^2 in each dimension
    4.0
    """
    mu1, sigma1, mu2, sigma2 = (torch.as_tensor(m).double() for m in (mu1, sigma1, mu2, sigma2))
    root = sqrt_psd(sigma2)
    cross = torch.linalg.eigvalsh(root @ sigma1 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross))


def trace_root_change(l, Z, core):
    """Tr (L + Z^T C Z)^(1/2) - Tr L^(1/2) with L = diag(l) [D], Z [G, r, D], C = core [r, r] -> [G], relative error about 1e-8.

    From x^(1/2) = 1/pi int_0^inf x / (x + s) s^(-1/2) ds, by parts, and the determinant lemma for the low rank r:
        = 1/(2 pi) int_0^inf s^(-1/2) log det(I + C Z (L + s)^(-1) Z^T) ds.
    With s = e^u the integrand is analytic in a strip of half-width pi, so the plain sum over u = ..., 0, 1, 2, ... errs by e^(-2 pi^2).
    O(D r^2) for each of about 90 u; from r = D/4 on, eigenvalues in O(D^3) are as fast.
    """
    if 4 * Z.shape[1] > Z.shape[2]:
        changed = torch.linalg.eigvalsh(torch.diag(l) + Z.transpose(1, 2) @ core @ Z)
        return changed.clamp(min=0).sqrt().sum(1) - l.sqrt().sum()
    size = Z.square().sum((1, 2)).max() * core.norm()                    # a change may be larger than all that it changes
    top = torch.maximum(l.max(), size).clamp(min=1e-300).log().item()
    u = torch.arange(math.floor(top) - 50, math.ceil(top) + 40, dtype=l.dtype, device=l.device)
    change = 0
    for s in u.exp().split(max(1, 2**24 // (Z.shape[0] * Z.shape[1] * Z.shape[2]))):
        resolvent = (Z / (l + s[:, None, None, None])) @ Z.transpose(1, 2)                   # [s, G, r, r]
        log_det = torch.linalg.slogdet(torch.eye(Z.shape[1], dtype=Z.dtype, device=Z.device) + core @ resolvent).logabsdet
        log_det = log_det.nan_to_num(neginf=0.0)                         # I is lost to rounding only where s^(1/2) is negligible
        change = change + (s.sqrt()[:, None] * log_det).sum(0) / (2 * math.pi)
    return change


def bend_factors(root, tolerance=1e-7):
    """a [Q, D] with sum_q a_qi a_qj = 1 / (r_i r_j (r_i + r_j)), Q from 10 to 20: a partial Cholesky of the kernel of that with diagonal 1.

    The kernel 2 (r_i r_j)^(1/2) / (r_i + r_j) is smooth in log r, so what is left falls exponentially with every pivot; it is a bound on
    every entry, relative to the geometric mean of the two diagonal ones.
    """
    left, factors = torch.ones_like(root), root.new_zeros(0, len(root))
    while left.max() > tolerance:
        i = left.argmax()
        column = 2 * (root * root[i]).sqrt() / (root + root[i]) - factors[:, i] @ factors
        factors = torch.cat([factors, (column / left[i].sqrt())[None]])
        left = (left - factors[-1].square()).clamp(min=0)
        left[i] = 0
    return factors / (2 * root**3).sqrt()


def quadratic_form(new, old, factors):
    """sum_ij E_ij^2 / (r_i r_j (r_i + r_j)) for E = N^T N - O^T O - n^T n, N = new[g, :-1], n = new[g, -1] and O = old [K, D] -> [G].

    E [D, D] is never made: sum_ij a_i a_j E_ij^2 = sum_kl s_k s_l (V diag(a) V^T)_kl^2, V all the rows and s their signs. O(Q K^2 D).
    """
    sign, total = torch.cat([new.new_ones(new.shape[1] - 1), -new.new_ones(1)]), 0
    for a in factors.to(new):
        own, across, among = (new * a) @ new.transpose(1, 2), (new * a) @ old.T, (old * a) @ old.T       # [G, A, A], [G, A, K], [K, K]
        total = total + (own.square() @ sign @ sign - 2 * (across.square().sum(2) @ sign) + among.square().sum()).double()
    return total


class SubsetReplace:
    """A reference of M generated features with running sums, its FID to the real moments, and the price of replacing some members.

    reference [M, D]; mu_real [D], sigma_real [D, D]. Features are kept in float32, sums in float64 about mu_real (so that they do not
    cancel). A price is a reward: positive when the FID falls.

    Why a price per picture exists. As a function of the generated distribution p, FID is W2^2(N(mu, S), N(m, C)). By duality
    W2^2 = max over (phi, psi) of E_p phi + E_real psi, and at the maximum the derivative along a change dp is that of the maximised
    linear form alone (envelope theorem): d FID = int phi dp. So the first variation is the Kantorovich potential phi. Between Gaussians
    the optimal map is T = R A^(-1/2) R about the means, and grad phi(f) = 2 (f - T(f)) integrates to
        phi(f) = 2 (mu - m).(f - mu) + (f - mu)^T (I - T) (f - mu).
    Replacing f_old by f_new moves p by (delta_new - delta_old) / M. Where this fails: FID is convex in S, so summed over many pictures it
    overstates the gain; and where S has no variance, A^(-1/2) is infinite (the gain of a first picture there goes like a square root):
    eigenvalues are floored at DAMPING, and `potential` and `quadratic` are then directions rather than sizes. `exact` has no such limit.

    >>> generator = torch.Generator().manual_seed(0)
    >>> pool = SubsetReplace(torch.randn(100, 2, generator=generator) + 2, torch.zeros(2), torch.eye(2))
    >>> distances = [pool.fid()]
    >>> for members in torch.arange(100).split(25):                         # 25 at a time make way for what real pictures are like
    ...     pool.replace(members, torch.randn(25, 2, generator=generator))
    ...     distances.append(pool.fid())
    >>> [round(distance) for distance in distances]
    [8, 5, 2, 1, 0]
    >>> good, bad = pool.price(torch.tensor([[[0.1, 0.0]], [[5.0, 5.0]]]), torch.tensor([0]))
    >>> bool(good > bad)
    True
    """

    def __init__(self, reference, mu_real, sigma_real):
        self.mu_real = torch.as_tensor(mu_real, device=reference.device).double()
        sigma_real = torch.as_tensor(sigma_real, device=reference.device).double()
        self.root, self.trace_real = sqrt_psd(sigma_real), sigma_real.trace()
        self.features = reference.float().clone()                        # [M, D]
        self.sums, self.spectrum = self.recomputed(), None

    def recomputed(self):
        """The sums from scratch, in shards: sum x [D] and sum x x^T [D, D] of x = feature - mu_real, float64."""
        total, squares = torch.zeros_like(self.mu_real), torch.zeros_like(self.root)
        for part in self.features.split(4096):
            x = part.double() - self.mu_real
            total += x.sum(0)
            squares += x.T @ x
        return total, squares

    def refresh(self, reference=None):
        """Recomputes the sums (of a wholly new reference, if one is given) -> how far they had drifted, relative to their size."""
        now = self.recomputed()
        drift = max(((a - b).norm() / b.norm().clamp(min=1e-300)).item() for a, b in zip(self.sums, now))
        if reference is not None:
            self.features.copy_(reference)
            now = self.recomputed()
        for kept, fresh in zip(self.sums, now):
            kept.copy_(fresh)
        self.spectrum = None
        return drift

    def moments(self):
        """-> mu - mu_real [D] and the unbiased covariance [D, D] of the reference."""
        M = len(self.features)
        shift = self.sums[0] / M
        return shift, (self.sums[1] - M * torch.outer(shift, shift)) / (M - 1)

    def fid(self):
        shift, sigma = self.moments()
        l, _ = self._spectrum()
        return max(0.0, float(shift.square().sum() + sigma.trace() + self.trace_real - 2 * l.sqrt().sum()))

    value = fid                                                          # the name that SubsetReplace and KernelReplace share

    def _spectrum(self):
        """Eigenvalues l [D] of A = R S R and B = R U [D, D]: in this basis a row w of a low-rank change of S is w B. Kept until a replacement."""
        if self.spectrum is None:
            l, U = torch.linalg.eigh(self.root @ self.moments()[1] @ self.root)
            self.spectrum = l.clamp(min=0), self.root @ U
        return self.spectrum

    def price(self, new, replaced, how="exact"):
        """The reward of putting new [G, K, D] in the place of members `replaced` [K], for each of G rollouts -> float64 [G]; potential: [G, K].

        exact      the change of the FID                                 quadratic  its second-order expansion in the covariance
        potential  first order, one price a picture: -(phi(f_new) - phi(f_old)) / M
        """
        M = len(self.features)
        shift, sigma = self.moments()
        l, B = self._spectrum()
        new, old = new.double() - self.mu_real - shift, self.features[replaced].double() - self.mu_real - shift     # about the mean
        floored = l.clamp(min=max(DAMPING * l.max().item(), 1e-60))          # all are 0 if the reference has no variance
        if how == "potential":
            phi = lambda x: 2 * x @ shift + x.square().sum(-1) - ((x @ B).square() / floored.sqrt()).sum(-1)
            return -(phi(new) - phi(old)) / M
        if how not in ("exact", "quadratic"):
            raise ValueError(f"how={how!r} is none of exact, quadratic, potential")
        G, K, D = new.shape
        pull = (new.sum(1) - old.sum(0))[:, None] / math.sqrt(M)                              # the mean has moved too: [G, 1, D]
        # (M - 1) dS = new^T new - old^T old - pull^T pull
        move, trace = pull[:, 0] / math.sqrt(M), (new.square().sum((1, 2)) - old.square().sum() - pull.square().sum((1, 2))) / (M - 1)
        if how == "exact":
            sign = torch.cat([torch.ones(K), -torch.ones(K)]).to(new)                        # pull is in their span: of rank 2K
            core = (torch.diag(sign) - torch.outer(sign, sign) / M) / (M - 1)
            cross = trace_root_change(l, torch.cat([new, old.expand(G, K, D)], 1) @ B, core)
        else:                                                            # E the change of A: sum E_ii / (2 l_i^1/2) - 1/4 sum E_ij^2 / (...)
            root, small = floored.sqrt(), torch.float64 if D < 512 else torch.float32         # time counts where D does; 1e-5 is enough there
            Z = torch.cat([new, pull], 1).flatten(0, 1).to(small) @ B.to(small)
            new, old = Z.reshape(G, K + 1, D), old.to(small) @ B.to(small)
            first = new[:, :K].double().square().sum(1) - old.double().square().sum(0) - new[:, K].double().square()          # E_ii [G, D]
            cross = (first / (2 * root)).sum(1) / (M - 1) - quadratic_form(new, old, bend_factors(root)) / (4 * (M - 1) ** 2)
        return -((shift + move).square().sum(1) - shift.square().sum() + trace - 2 * cross)

    def state(self):
        """The tensors that a checkpoint holds; copied back in place before anything is asked of this object."""
        return {"reference.features": self.features, "reference.sums.0": self.sums[0], "reference.sums.1": self.sums[1]}

    def replace(self, index, new):
        """Members index [K] become new [K, D]; the sums follow."""
        old, self.features[index] = self.features[index], new.float()
        for sign, part in ((1, self.features[index]), (-1, old)):        # the float32 values that are kept, so that nothing drifts
            x = part.double() - self.mu_real
            self.sums[0].add_(sign * x.sum(0))
            self.sums[1].add_(sign * (x.T @ x))
        self.spectrum = None


def polynomial_kernel(x, y):
    """KID's kernel (x.y / D + 1)^3: [A, D], [B, D] -> [A, B], float64."""
    return (x.double() @ y.double().T / x.shape[-1] + 1) ** 3


def kernel_sums(x, y, shard=4096):
    """sum over y of k(x, y), for each x: [A, D], [B, D] -> [A], float64."""
    return sum(polynomial_kernel(x, part).sum(1) for part in y.split(shard))


class KernelReplace:
    """The same for KID, the unbiased squared MMD with the cubic kernel (arXiv 1801.01401); needs real features [R, D], not moments.

    KID is quadratic in the generated distribution, so `quadratic` is `exact`, and the potential is the witness function
        phi(f) = 2 (mean over generated of k(f, x) - mean over real of k(f, y)).
    """

    def __init__(self, reference, real):
        self.features, self.real = reference.float().clone(), real.float()
        R = len(real)
        self.real_term = (kernel_sums(self.real, self.real) - self.own(self.real)).sum() / (R * (R - 1))
        self.sums = self.recomputed()

    def recomputed(self):
        """sum over j of k(x_i, x_j), its own term included [M], and the mean over real y of k(x_i, y) [M]."""
        return kernel_sums(self.features, self.features), kernel_sums(self.features, self.real) / len(self.real)

    refresh, state = SubsetReplace.refresh, SubsetReplace.state

    def own(self, x):
        """k(x, x) for each row: what an unbiased mean over pairs leaves out."""
        return (x.double().square().sum(-1) / x.shape[-1] + 1) ** 3

    def value(self):
        M, (among, to_real) = len(self.features), self.sums
        return float((among - self.own(self.features)).sum() / (M * (M - 1)) + self.real_term - 2 * to_real.mean())

    def price(self, new, replaced, how="exact"):
        """As SubsetReplace.price."""
        M, (G, K, D), (among, to_real) = len(self.features), new.shape, self.sums
        new, old = new.float(), self.features[replaced]
        with_all = kernel_sums(new.reshape(-1, D), self.features).reshape(G, K)               # sum over the reference of k(new, x)
        with_real = kernel_sums(new.reshape(-1, D), self.real).reshape(G, K) / len(self.real)
        if how == "potential":
            phi_new, phi_old = 2 * (with_all / M - with_real), 2 * (among[replaced] / M - to_real[replaced])
            return -(phi_new - phi_old) / M
        if how not in ("exact", "quadratic"):
            raise ValueError(f"how={how!r} is none of exact, quadratic, potential")
        pairs = lambda x: polynomial_kernel(x, x).sum() - self.own(x).sum()                   # of different members
        among_new = torch.stack([pairs(x) for x in new])
        across = torch.stack([polynomial_kernel(x, old).sum() for x in new])
        gone = 2 * (among[replaced] - self.own(old)).sum() - pairs(old)                    # pairs that lose a member
        change = (2 * (with_all.sum(1) - across) + among_new - gone) / (M * (M - 1))
        return -(change - 2 * (with_real.sum(1) - to_real[replaced].sum()) / M)

    def replace(self, index, new):
        """Members index [K] become new [K, D]; the sums follow."""
        old, new = self.features[index], new.float()
        among, to_real = self.sums
        among += kernel_sums(self.features, new) - kernel_sums(self.features, old)
        self.features[index] = new
        among[index] = kernel_sums(new, self.features)
        to_real[index] = kernel_sums(new, self.real) / len(self.real)


def price_groups(pool, new, oldest, how="potential", replace=0):
    """The reward of every rollout of P groups: features new [P, N, D] -> [P, N].

    A rollout of subset-replace is a set of K = `replace` pictures of K different groups (0: of all P), so that its N rivals have the same
    prompts; they are priced against the same K members, the oldest, and each picture earns a K-th of the one price. With how="potential" each
    picture earns its own. In units of the distance: what it would fall by if all M members changed so, to first order.
    Raises ValueError if K does not divide P.
    """
    P, N, D = new.shape
    K = replace or P
    if P % K:
        raise ValueError(f"sets of {K} pictures do not divide {P} groups")
    rewards, M = [], len(pool.features)
    for block, part in enumerate(new.split(K)):                          # [K, N, D]
        members = (oldest + block * K + torch.arange(K, device=new.device)) % M
        price = M * pool.price(part.transpose(0, 1), members, how)
        rewards.append(price.T if how == "potential" else (price / K).expand(K, N))
    return torch.cat(rewards)
