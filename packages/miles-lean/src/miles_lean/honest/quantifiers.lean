theorem q_all_imp {α : Type} (p q : α → Prop) (f : ∀ x, p x → q x) (h : ∀ x, p x) : ∀ x, q x := by
  intro x
  exact f x (h x)

theorem q_all_and {α : Type} (p q : α → Prop) : (∀ x, p x ∧ q x) ↔ (∀ x, p x) ∧ ∀ x, q x := by
  constructor
  · intro h
    exact ⟨fun x => (h x).1, fun x => (h x).2⟩
  · intro ⟨h, k⟩ x
    exact ⟨h x, k x⟩

theorem q_ex_or {α : Type} (p q : α → Prop) : (∃ x, p x ∨ q x) ↔ (∃ x, p x) ∨ ∃ x, q x := by
  constructor
  · rintro ⟨x, h | h⟩
    · exact Or.inl ⟨x, h⟩
    · exact Or.inr ⟨x, h⟩
  · rintro (⟨x, h⟩ | ⟨x, h⟩)
    · exact ⟨x, Or.inl h⟩
    · exact ⟨x, Or.inr h⟩

theorem q_ex_and {α : Type} (p q : α → Prop) (h : ∃ x, p x ∧ q x) : (∃ x, p x) ∧ ∃ x, q x := by
  obtain ⟨x, hp, hq⟩ := h
  exact ⟨⟨x, hp⟩, ⟨x, hq⟩⟩

theorem q_not_ex {α : Type} (p : α → Prop) : (¬∃ x, p x) ↔ ∀ x, ¬p x := by
  simp

theorem q_not_ex_long {α : Type} (p : α → Prop) (h : ∀ x, ¬p x) : ¬∃ x, p x := by
  rintro ⟨x, hx⟩
  exact h x hx

theorem q_not_all {α : Type} (p : α → Prop) : (¬∀ x, p x) ↔ ∃ x, ¬p x := by
  exact Classical.not_forall

theorem q_not_all_long {α : Type} (p : α → Prop) (h : ∃ x, ¬p x) : ¬∀ x, p x := by
  intro f
  cases h with
  | intro x n => exact n (f x)

theorem q_ex_intro : ∃ n : Nat, n * n = 49 := by
  exists 7

theorem q_ex_intro_term : ∃ n : Nat, n + 3 = 10 :=
  ⟨7, rfl⟩

theorem q_ex_two : ∃ a b : Nat, a + b = 5 ∧ a * b = 6 := by
  exact ⟨2, 3, rfl, rfl⟩

theorem q_swap {α β : Type} (r : α → β → Prop) (h : ∃ x, ∀ y, r x y) : ∀ y, ∃ x, r x y := by
  intro y
  obtain ⟨x, hx⟩ := h
  exact ⟨x, hx y⟩

theorem q_all_swap {α β : Type} (r : α → β → Prop) (h : ∀ x y, r x y) : ∀ y x, r x y := by
  intro y x
  apply h

theorem q_drinker {α : Type} (a : α) (p : α → Prop) : ∃ x, p x → ∀ y, p y := by
  by_cases h : ∀ y, p y
  · exact ⟨a, fun _ => h⟩
  · obtain ⟨x, hx⟩ := Classical.not_forall.mp h
    exact ⟨x, fun hp => absurd hp hx⟩

theorem q_const {α : Type} (a : α) (b : Prop) : (∃ _ : α, b) ↔ b := by
  constructor
  · rintro ⟨_, h⟩
    exact h
  · intro h
    exact ⟨a, h⟩

theorem q_eq_left {α : Type} (a : α) (p : α → Prop) : (∃ x, x = a ∧ p x) ↔ p a := by
  simp

theorem q_all_eq {α : Type} (a : α) (p : α → Prop) : (∀ x, x = a → p x) ↔ p a := by
  simp

theorem q_ex_imp {α : Type} (p : α → Prop) (b : Prop) : ((∃ x, p x) → b) ↔ ∀ x, p x → b := by
  constructor
  · intro f x hx
    exact f ⟨x, hx⟩
  · intro f ⟨x, hx⟩
    exact f x hx

theorem q_barber {α : Type} (shaves : α → α → Prop) (b : α) (h : ∀ x, shaves b x ↔ ¬shaves x x) : False := by
  have k := h b
  have n : ¬shaves b b := fun s => k.mp s s
  exact n (k.mpr n)

theorem q_cantor {α : Type} (f : α → α → Prop) : ∃ p : α → Prop, ∀ x, f x ≠ p := by
  refine ⟨fun x => ¬f x x, ?_⟩
  intro x h
  have k : f x x = ¬f x x := congrFun h x
  by_cases c : f x x
  · exact (k ▸ c) c
  · exact c (k.symm ▸ c)

theorem q_subst {α : Type} (a b : α) (p : α → Prop) (h : a = b) (ha : p a) : p b := by
  subst h
  exact ha

theorem q_rewrite {α : Type} (a b : α) (p : α → Prop) (h : a = b) (ha : p a) : p b := by
  rw [← h]
  exact ha

theorem q_triangle {α : Type} (a b : α) (p : α → Prop) (h : a = b) (ha : p a) : p b :=
  h ▸ ha

theorem q_eq_trans {α : Type} (a b c : α) (h : a = b) (k : b = c) : a = c := by
  calc a = b := h
    _ = c := k

theorem q_eq_symm {α : Type} (a b : α) (h : a = b) : b = a := by
  symm
  exact h

theorem q_congr {α β : Type} (f : α → β) (a b : α) (h : a = b) : f a = f b := by
  rw [h]

theorem q_congr_tac {α β : Type} (f : α → β) (a b : α) (h : a = b) : f a = f b := by
  congr

theorem q_funext {α β : Type} (f g : α → β) (h : ∀ x, f x = g x) : f = g := by
  funext x
  exact h x

theorem q_comp {α β γ : Type} (f : α → β) (g : β → γ) (x : α) : (g ∘ f) x = g (f x) := by
  rfl

theorem q_injective {α β γ : Type} (f : α → β) (g : β → γ) (hf : ∀ a b, f a = f b → a = b) (hg : ∀ a b, g a = g b → a = b) (a b : α) (h : g (f a) = g (f b)) : a = b := by
  apply hf
  apply hg
  exact h

theorem q_surjective {α β γ : Type} (f : α → β) (g : β → γ) (hf : ∀ y, ∃ x, f x = y) (hg : ∀ z, ∃ y, g y = z) (z : γ) : ∃ x, g (f x) = z := by
  obtain ⟨y, hy⟩ := hg z
  obtain ⟨x, hx⟩ := hf y
  exact ⟨x, by rw [hx, hy]⟩

theorem q_choice {α β : Type} (r : α → β → Prop) (h : ∀ x, ∃ y, r x y) : ∃ f : α → β, ∀ x, r x (f x) := by
  exact ⟨fun x => Classical.choose (h x), fun x => Classical.choose_spec (h x)⟩

theorem q_left_inverse {α β : Type} (f : α → β) (g : β → α) (h : ∀ x, g (f x) = x) (a b : α) (k : f a = f b) : a = b := by
  rw [← h a, ← h b, k]

theorem q_unique {α : Type} (p : α → Prop) (h : ∀ x y, p x → p y → x = y) (a b : α) (ha : p a) (hb : p b) : a = b := by
  exact h a b ha hb

theorem q_nonempty {α : Type} (p : α → Prop) (h : ∃ x, p x) : Nonempty α := by
  obtain ⟨x, _⟩ := h
  exact ⟨x⟩

theorem q_all_true {α : Type} : ∀ _ : α, True := by
  intro _
  trivial

theorem q_ex_false {α : Type} : ¬∃ _ : α, False := by
  simp

theorem q_symmetric {α : Type} (r : α → α → Prop) (s : ∀ x y, r x y → r y x) (t : ∀ x y z, r x y → r y z → r x z) (a b : α) (h : r a b) : r a a := by
  exact t a b a h (s a b h)

theorem q_order {α : Type} (r : α → α → Prop) (irr : ∀ x, ¬r x x) (t : ∀ x y z, r x y → r y z → r x z) (a b : α) (h : r a b) : ¬r b a := by
  intro k
  exact irr a (t a b a h k)

theorem q_pair_ext {α β : Type} (p q : α × β) (h : p.1 = q.1) (k : p.2 = q.2) : p = q := by
  exact Prod.ext h k

theorem q_pair_simp {α β : Type} (a c : α) (b d : β) (h : (a, b) = (c, d)) : b = d := by
  simp at h
  exact h.2

theorem q_ite {α : Type} (c : Prop) [Decidable c] (a b : α) (h : c) : (if c then a else b) = a := by
  simp [h]

theorem q_ite_not {α : Type} (c : Prop) [Decidable c] (a b : α) (h : ¬c) : (if c then a else b) = b := by
  rw [if_neg h]

theorem q_ite_split (c : Prop) [Decidable c] (a b : Nat) (h : a = b) : (if c then a else b) = a := by
  split
  · rfl
  · exact h.symm

theorem q_ite_same {α : Type} (c : Prop) [Decidable c] (a : α) : (if c then a else a) = a := by
  simp
