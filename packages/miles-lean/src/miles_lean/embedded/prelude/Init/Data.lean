/-
Booleans, options, pairs and lists.
-/
prelude
import Init.Div

set_option linter.unusedVariables false

/-! ### Bool -/
namespace Bool
@[simp] theorem true_and (b : Bool) : (true && b) = b := rfl
@[simp] theorem false_and (b : Bool) : (false && b) = false := rfl
@[simp] theorem and_true (b : Bool) : (b && true) = b := by cases b <;> rfl
@[simp] theorem and_false (b : Bool) : (b && false) = false := by cases b <;> rfl
@[simp] theorem and_self (b : Bool) : (b && b) = b := by cases b <;> rfl
@[simp] theorem true_or (b : Bool) : (true || b) = true := rfl
@[simp] theorem false_or (b : Bool) : (false || b) = b := rfl
@[simp] theorem or_true (b : Bool) : (b || true) = true := by cases b <;> rfl
@[simp] theorem or_false (b : Bool) : (b || false) = b := by cases b <;> rfl
@[simp] theorem or_self (b : Bool) : (b || b) = b := by cases b <;> rfl
@[simp] theorem not_true : (!true) = false := rfl
@[simp] theorem not_false : (!false) = true := rfl
@[simp] theorem not_not (b : Bool) : (!!b) = b := by cases b <;> rfl
@[simp] theorem and_not_self (b : Bool) : (b && !b) = false := by cases b <;> rfl
@[simp] theorem not_and_self (b : Bool) : (!b && b) = false := by cases b <;> rfl
@[simp] theorem or_not_self (b : Bool) : (b || !b) = true := by cases b <;> rfl
@[simp] theorem not_or_self (b : Bool) : (!b || b) = true := by cases b <;> rfl
@[simp] theorem not_and (a b : Bool) : (!(a && b)) = (!a || !b) := by cases a <;> rfl
@[simp] theorem not_or (a b : Bool) : (!(a || b)) = (!a && !b) := by cases a <;> rfl
@[simp] theorem not_eq_true (b : Bool) : (¬(b = true)) = (b = false) := by cases b <;> simp
@[simp] theorem not_eq_false (b : Bool) : (¬(b = false)) = (b = true) := by cases b <;> simp
@[simp] theorem not_eq_true' {b : Bool} : ((!b) = true) = (b = false) := by cases b <;> simp
@[simp] theorem not_eq_false' {b : Bool} : ((!b) = false) = (b = true) := by cases b <;> simp
@[simp] theorem and_eq_true (a b : Bool) : ((a && b) = true) = (a = true ∧ b = true) := by cases a <;> cases b <;> simp
@[simp] theorem or_eq_true (a b : Bool) : ((a || b) = true) = (a = true ∨ b = true) := by cases a <;> cases b <;> simp
@[simp] theorem and_eq_false_iff (a b : Bool) : ((a && b) = false) ↔ (a = false ∨ b = false) := by cases a <;> cases b <;> simp
@[simp] theorem or_eq_false_iff (a b : Bool) : ((a || b) = false) ↔ (a = false ∧ b = false) := by cases a <;> cases b <;> simp
theorem and_comm (a b : Bool) : (a && b) = (b && a) := by cases a <;> cases b <;> rfl
theorem or_comm (a b : Bool) : (a || b) = (b || a) := by cases a <;> cases b <;> rfl
theorem and_assoc (a b c : Bool) : (a && b && c) = (a && (b && c)) := by cases a <;> rfl
theorem or_assoc (a b c : Bool) : (a || b || c) = (a || (b || c)) := by cases a <;> rfl
theorem and_or_distrib_left (a b c : Bool) : (a && (b || c)) = (a && b || a && c) := by cases a <;> rfl
theorem or_and_distrib_left (a b c : Bool) : (a || b && c) = ((a || b) && (a || c)) := by cases a <;> rfl
theorem eq_false_or_eq_true (b : Bool) : b = true ∨ b = false := by cases b <;> simp
def xor (a b : Bool) : Bool :=
  match a, b with
  | true, b => !b
  | false, b => b
@[simp] theorem xor_false (b : Bool) : xor b false = b := by cases b <;> rfl
@[simp] theorem xor_true (b : Bool) : xor b true = !b := by cases b <;> rfl
@[simp] theorem xor_self (b : Bool) : xor b b = false := by cases b <;> rfl
theorem xor_comm (a b : Bool) : xor a b = xor b a := by cases a <;> cases b <;> rfl
end Bool
@[simp] theorem cond_true {α : Sort u} (a b : α) : cond true a b = a := rfl
@[simp] theorem cond_false {α : Sort u} (a b : α) : cond false a b = b := rfl
@[simp] theorem Bool.cond_self {α : Sort u} (c : Bool) (a : α) : cond c a a = a := by cases c <;> rfl
@[simp] theorem beq_self_eq_true' {α : Type u} [DecidableEq α] (a : α) : (a == a) = true := decide_eq_true rfl
theorem beq_iff_eq' {α : Type u} [DecidableEq α] {a b : α} : (a == b) = true ↔ a = b := ⟨of_decide_eq_true, decide_eq_true⟩
theorem Nat.beq_eq_true_eq (a b : Nat) : ((a == b) = true) = (a = b) := propext ⟨Nat.eq_of_beq_eq_true, fun h => h ▸ Nat.beq_refl a⟩

/-! ### Pairs -/
@[simp] theorem Prod.mk.eta {α : Type u} {β : Type v} (p : α × β) : (p.1, p.2) = p := rfl
theorem Prod.ext {α : Type u} {β : Type v} {p q : α × β} (h₁ : p.1 = q.1) (h₂ : p.2 = q.2) : p = q := by
  cases p; cases q; cases h₁; cases h₂; rfl
def Prod.swap {α : Type u} {β : Type v} (p : α × β) : β × α := (p.2, p.1)
@[simp] theorem Prod.swap_swap {α : Type u} {β : Type v} (p : α × β) : p.swap.swap = p := rfl
@[simp] theorem Prod.mk_inj {α : Type u} {β : Type v} {a c : α} {b d : β} : (a, b) = (c, d) ↔ a = c ∧ b = d :=
  ⟨fun h => ⟨congrArg Prod.fst h, congrArg Prod.snd h⟩, fun h => by rw [h.1, h.2]⟩
theorem Subtype.ext {α : Sort u} {p : α → Prop} {a b : {x // p x}} (h : a.val = b.val) : a = b := by
  cases a; cases b; cases h; rfl

/-! ### Option -/
namespace Option
@[simp] theorem some_inj {α : Type u} {a b : α} : some a = some b ↔ a = b := ⟨fun h => by injection h, fun h => h ▸ rfl⟩
theorem some_ne_none {α : Type u} (a : α) : some a ≠ none := fun h => nomatch h
@[inline] def map {α : Type u} {β : Type v} (f : α → β) : Option α → Option β
  | some x => some (f x)
  | none => none
@[inline] protected def bind {α : Type u} {β : Type v} : Option α → (α → Option β) → Option β
  | none, _ => none
  | some a, f => f a
@[inline] def getD {α : Type u} (o : Option α) (d : α) : α :=
  match o with
  | some x => x
  | none => d
@[inline] def isSome {α : Type u} : Option α → Bool
  | some _ => true
  | none => false
@[inline] def isNone {α : Type u} : Option α → Bool
  | some _ => false
  | none => true
@[inline] def orElse {α : Type u} (o p : Option α) : Option α :=
  match o with
  | some x => some x
  | none => p
@[simp] theorem map_none {α : Type u} {β : Type v} (f : α → β) : map f none = none := rfl
@[simp] theorem map_some {α : Type u} {β : Type v} (f : α → β) (a : α) : map f (some a) = some (f a) := rfl
@[simp] theorem map_id {α : Type u} (o : Option α) : map id o = o := by cases o <;> rfl
@[simp] theorem map_map {α : Type u} {β : Type v} {γ : Type w} (g : β → γ) (f : α → β) (o : Option α) : map g (map f o) = map (g ∘ f) o := by cases o <;> rfl
@[simp] theorem bind_none {α : Type u} {β : Type v} (f : α → Option β) : Option.bind none f = none := rfl
@[simp] theorem bind_some {α : Type u} {β : Type v} (a : α) (f : α → Option β) : Option.bind (some a) f = f a := rfl
@[simp] theorem bind_some_right {α : Type u} (o : Option α) : Option.bind o some = o := by cases o <;> rfl
theorem bind_assoc {α : Type u} {β : Type v} {γ : Type w} (o : Option α) (f : α → Option β) (g : β → Option γ) :
    Option.bind (Option.bind o f) g = Option.bind o fun x => Option.bind (f x) g := by cases o <;> rfl
@[simp] theorem getD_none {α : Type u} (d : α) : getD none d = d := rfl
@[simp] theorem getD_some {α : Type u} (a d : α) : getD (some a) d = a := rfl
@[simp] theorem isSome_none {α : Type u} : isSome (none : Option α) = false := rfl
@[simp] theorem isSome_some {α : Type u} (a : α) : isSome (some a) = true := rfl
@[simp] theorem isNone_none {α : Type u} : isNone (none : Option α) = true := rfl
@[simp] theorem isNone_some {α : Type u} (a : α) : isNone (some a) = false := rfl
@[simp] theorem orElse_none {α : Type u} (o : Option α) : orElse o none = o := by cases o <;> rfl
@[simp] theorem none_orElse {α : Type u} (o : Option α) : orElse none o = o := rfl
@[simp] theorem isSome_map {α : Type u} {β : Type v} (f : α → β) (o : Option α) : isSome (map f o) = isSome o := by cases o <;> rfl
theorem eq_none_or_eq_some {α : Type u} (o : Option α) : o = none ∨ ∃ a, o = some a := by
  cases o with
  | none => exact .inl rfl
  | some a => exact .inr ⟨a, rfl⟩
theorem eq_none_iff_forall_ne_some {α : Type u} {o : Option α} : o = none ↔ ∀ a, o ≠ some a := by
  cases o with
  | none => exact ⟨fun _ _ h => (nomatch h), fun _ => rfl⟩
  | some a => exact ⟨fun h => (nomatch h), fun h => absurd rfl (h a)⟩
end Option

/-! ### List -/
namespace List
protected def append {α : Type u} : List α → List α → List α
  | [], bs => bs
  | a :: as, bs => a :: List.append as bs
instance {α : Type u} : Append (List α) := ⟨List.append⟩
def length {α : Type u} : List α → Nat
  | [] => 0
  | _ :: as => length as + 1
def map {α : Type u} {β : Type v} (f : α → β) : List α → List β
  | [] => []
  | a :: as => f a :: map f as
def filter {α : Type u} (p : α → Bool) : List α → List α
  | [] => []
  | a :: as => match p a with
    | true => a :: filter p as
    | false => filter p as
def foldr {α : Type u} {β : Type v} (f : α → β → β) (init : β) : List α → β
  | [] => init
  | a :: as => f a (foldr f init as)
def foldl {α : Type u} {β : Type v} (f : β → α → β) (init : β) : List α → β
  | [] => init
  | a :: as => foldl f (f init a) as
def reverse {α : Type u} : List α → List α
  | [] => []
  | a :: as => reverse as ++ [a]
def replicate {α : Type u} : Nat → α → List α
  | 0, _ => []
  | n + 1, a => a :: replicate n a
def take {α : Type u} : Nat → List α → List α
  | 0, _ => []
  | _ + 1, [] => []
  | n + 1, a :: as => a :: take n as
def drop {α : Type u} : Nat → List α → List α
  | 0, as => as
  | _ + 1, [] => []
  | n + 1, _ :: as => drop n as
def head? {α : Type u} : List α → Option α
  | [] => none
  | a :: _ => some a
def tail {α : Type u} : List α → List α
  | [] => []
  | _ :: as => as
def sum : List Nat → Nat
  | [] => 0
  | a :: as => a + sum as
def all {α : Type u} (p : α → Bool) : List α → Bool
  | [] => true
  | a :: as => p a && all p as
def any {α : Type u} (p : α → Bool) : List α → Bool
  | [] => false
  | a :: as => p a || any p as
def zip {α : Type u} {β : Type v} : List α → List β → List (α × β)
  | a :: as, b :: bs => (a, b) :: zip as bs
  | _, _ => []
def range : Nat → List Nat
  | 0 => []
  | n + 1 => range n ++ [n]
inductive Mem {α : Type u} (a : α) : List α → Prop where
  | head (as : List α) : Mem a (a :: as)
  | tail (b : α) {as : List α} : Mem a as → Mem a (b :: as)
instance {α : Type u} : Membership α (List α) := ⟨fun l a => Mem a l⟩
protected def decEq {α : Type u} [DecidableEq α] : (a b : List α) → Decidable (a = b)
  | [], [] => isTrue rfl
  | [], _ :: _ => isFalse fun h => nomatch h
  | _ :: _, [] => isFalse fun h => nomatch h
  | a :: as, b :: bs =>
    match (inferInstance : Decidable (a = b)) with
    | isFalse n => isFalse fun h => n (by injection h)
    | isTrue e => match List.decEq as bs with
      | isFalse n => isFalse fun h => n (by injection h)
      | isTrue e' => isTrue (e ▸ e' ▸ rfl)
instance {α : Type u} [DecidableEq α] : DecidableEq (List α) := List.decEq

variable {α : Type u} {β : Type v} {γ : Type w}
theorem cons_ne_nil (a : α) (l : List α) : a :: l ≠ [] := fun h => nomatch h
@[simp] theorem cons.injEq' {a b : α} {l m : List α} : a :: l = b :: m ↔ a = b ∧ l = m := ⟨fun h => by injection h; constructor <;> assumption, fun h => by rw [h.1, h.2]⟩
theorem exists_cons_of_ne_nil {l : List α} (h : l ≠ []) : ∃ a m, l = a :: m := by
  cases l with
  | nil => exact absurd rfl h
  | cons a m => exact ⟨a, m, rfl⟩
@[simp] theorem nil_append (l : List α) : [] ++ l = l := rfl
@[simp] theorem cons_append (a : α) (l m : List α) : a :: l ++ m = a :: (l ++ m) := rfl
@[simp] theorem append_nil (l : List α) : l ++ [] = l := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [cons_append, ih]
@[simp] theorem append_assoc (l m n : List α) : l ++ m ++ n = l ++ (m ++ n) := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [cons_append, cons_append, cons_append, ih]
@[simp] theorem append_eq_nil_iff {l m : List α} : l ++ m = [] ↔ l = [] ∧ m = [] := by
  cases l with
  | nil => exact ⟨fun h => ⟨rfl, h⟩, fun h => h.2⟩
  | cons a l => exact ⟨fun h => (nomatch h), fun h => (nomatch h.1)⟩
theorem append_cancel_left {l m n : List α} (h : l ++ m = l ++ n) : m = n := by
  induction l with
  | nil => exact h
  | cons a l ih => exact ih (by injection h)
@[simp] theorem append_cancel_left_iff {l m n : List α} : l ++ m = l ++ n ↔ m = n := ⟨append_cancel_left, fun h => h ▸ rfl⟩
@[simp] theorem length_nil : length ([] : List α) = 0 := rfl
@[simp] theorem length_cons (a : α) (l : List α) : length (a :: l) = length l + 1 := rfl
@[simp] theorem length_append (l m : List α) : length (l ++ m) = length l + length m := by
  induction l with
  | nil => simp
  | cons a l ih => rw [cons_append, length_cons, ih, length_cons, Nat.add_right_comm]
@[simp] theorem length_eq_zero_iff {l : List α} : length l = 0 ↔ l = [] := by cases l <;> simp
theorem length_pos_of_mem {a : α} {l : List α} (h : a ∈ l) : 0 < length l := by
  cases l with
  | nil => exact nomatch h
  | cons b l => exact Nat.zero_lt_succ _
@[simp] theorem map_nil (f : α → β) : map f [] = [] := rfl
@[simp] theorem map_cons (f : α → β) (a : α) (l : List α) : map f (a :: l) = f a :: map f l := rfl
@[simp] theorem map_append (f : α → β) (l m : List α) : map f (l ++ m) = map f l ++ map f m := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [cons_append, map_cons, ih]; rfl
@[simp] theorem length_map (f : α → β) (l : List α) : length (map f l) = length l := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [map_cons, length_cons, ih]; rfl
@[simp] theorem map_id (l : List α) : map id l = l := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [map_cons, ih]; rfl
@[simp] theorem map_map (g : β → γ) (f : α → β) (l : List α) : map g (map f l) = map (g ∘ f) l := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [map_cons, map_cons, ih]; rfl
@[simp] theorem map_eq_nil_iff {f : α → β} {l : List α} : map f l = [] ↔ l = [] := by cases l <;> simp
@[simp] theorem filter_nil (p : α → Bool) : filter p [] = [] := rfl
theorem filter_cons (p : α → Bool) (a : α) (l : List α) : filter p (a :: l) = if p a then a :: filter p l else filter p l := by
  show (match p a with | true => a :: filter p l | false => filter p l) = _
  cases p a <;> rfl
@[simp] theorem filter_cons_of_pos {p : α → Bool} {a : α} (l : List α) (h : p a = true) : filter p (a :: l) = a :: filter p l := by rw [filter_cons, if_pos h]
@[simp] theorem filter_cons_of_neg {p : α → Bool} {a : α} (l : List α) (h : ¬p a = true) : filter p (a :: l) = filter p l := by rw [filter_cons, if_neg h]
@[simp] theorem filter_append (p : α → Bool) (l m : List α) : filter p (l ++ m) = filter p l ++ filter p m := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [cons_append, filter_cons, filter_cons, ih]; split <;> rfl
theorem length_filter_le (p : α → Bool) (l : List α) : length (filter p l) ≤ length l := by
  induction l with
  | nil => exact Nat.le_refl 0
  | cons a l ih =>
    rw [filter_cons]; split
    · exact Nat.succ_le_succ ih
    · exact Nat.le_succ_of_le ih
@[simp] theorem foldr_nil (f : α → β → β) (b : β) : foldr f b [] = b := rfl
@[simp] theorem foldr_cons (f : α → β → β) (b : β) (a : α) (l : List α) : foldr f b (a :: l) = f a (foldr f b l) := rfl
@[simp] theorem foldl_nil (f : β → α → β) (b : β) : foldl f b [] = b := rfl
@[simp] theorem foldl_cons (f : β → α → β) (b : β) (a : α) (l : List α) : foldl f b (a :: l) = foldl f (f b a) l := rfl
@[simp] theorem foldr_append (f : α → β → β) (b : β) (l m : List α) : foldr f b (l ++ m) = foldr f (foldr f b m) l := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [cons_append, foldr_cons, ih]; rfl
@[simp] theorem foldl_append (f : β → α → β) (b : β) (l m : List α) : foldl f b (l ++ m) = foldl f (foldl f b l) m := by
  induction l generalizing b with
  | nil => rfl
  | cons a l ih => exact ih (f b a)
@[simp] theorem reverse_nil : reverse ([] : List α) = [] := rfl
@[simp] theorem reverse_cons (a : α) (l : List α) : reverse (a :: l) = reverse l ++ [a] := rfl
@[simp] theorem reverse_append (l m : List α) : reverse (l ++ m) = reverse m ++ reverse l := by
  induction l with
  | nil => exact (append_nil _).symm
  | cons a l ih => rw [cons_append, reverse_cons, ih, reverse_cons, append_assoc]
@[simp] theorem reverse_reverse (l : List α) : reverse (reverse l) = l := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [reverse_cons, reverse_append, ih]; rfl
@[simp] theorem length_reverse (l : List α) : length (reverse l) = length l := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [reverse_cons, length_append, ih]; rfl
@[simp] theorem map_reverse (f : α → β) (l : List α) : map f (reverse l) = reverse (map f l) := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [reverse_cons, map_append, ih]; rfl
@[simp] theorem replicate_zero (a : α) : replicate 0 a = [] := rfl
theorem replicate_succ (n : Nat) (a : α) : replicate (n + 1) a = a :: replicate n a := rfl
@[simp] theorem length_replicate (n : Nat) (a : α) : length (replicate n a) = n := by
  induction n with
  | zero => rfl
  | succ n ih => rw [replicate_succ, length_cons, ih]
@[simp] theorem take_zero (l : List α) : take 0 l = [] := rfl
@[simp] theorem take_nil (n : Nat) : take n ([] : List α) = [] := by cases n <;> rfl
@[simp] theorem take_succ_cons (n : Nat) (a : α) (l : List α) : take (n + 1) (a :: l) = a :: take n l := rfl
@[simp] theorem drop_zero (l : List α) : drop 0 l = l := rfl
@[simp] theorem drop_nil (n : Nat) : drop n ([] : List α) = [] := by cases n <;> rfl
@[simp] theorem drop_succ_cons (n : Nat) (a : α) (l : List α) : drop (n + 1) (a :: l) = drop n l := rfl
@[simp] theorem take_append_drop (n : Nat) (l : List α) : take n l ++ drop n l = l := by
  induction n generalizing l with
  | zero => rfl
  | succ n ih =>
    cases l with
    | nil => rfl
    | cons a l => rw [take_succ_cons, drop_succ_cons, cons_append, ih]
@[simp] theorem length_drop (n : Nat) (l : List α) : length (drop n l) = length l - n := by
  induction n generalizing l with
  | zero => rfl
  | succ n ih =>
    cases l with
    | nil => exact (Nat.zero_sub _).symm
    | cons a l => rw [drop_succ_cons, ih, length_cons, Nat.add_one_sub_add_one]
@[simp] theorem take_length (l : List α) : take (length l) l = l := by
  induction l with
  | nil => rfl
  | cons a l ih => rw [length_cons, take_succ_cons, ih]
@[simp] theorem head?_nil : head? ([] : List α) = none := rfl
@[simp] theorem head?_cons (a : α) (l : List α) : head? (a :: l) = some a := rfl
@[simp] theorem tail_nil : tail ([] : List α) = [] := rfl
@[simp] theorem tail_cons (a : α) (l : List α) : tail (a :: l) = l := rfl
@[simp] theorem sum_nil : sum [] = 0 := rfl
@[simp] theorem sum_cons (a : Nat) (l : List Nat) : sum (a :: l) = a + sum l := rfl
@[simp] theorem sum_append (l m : List Nat) : sum (l ++ m) = sum l + sum m := by
  induction l with
  | nil => simp
  | cons a l ih => rw [cons_append, sum_cons, ih, sum_cons, Nat.add_assoc]
@[simp] theorem all_nil (p : α → Bool) : all p [] = true := rfl
@[simp] theorem all_cons (p : α → Bool) (a : α) (l : List α) : all p (a :: l) = (p a && all p l) := rfl
@[simp] theorem any_nil (p : α → Bool) : any p [] = false := rfl
@[simp] theorem any_cons (p : α → Bool) (a : α) (l : List α) : any p (a :: l) = (p a || any p l) := rfl
@[simp] theorem length_range (n : Nat) : length (range n) = n := by
  induction n with
  | zero => rfl
  | succ n ih => rw [show range (n + 1) = range n ++ [n] from rfl, length_append, ih]; rfl
@[simp] theorem not_mem_nil (a : α) : ¬a ∈ [] := fun h => nomatch h
@[simp] theorem mem_cons {a b : α} {l : List α} : a ∈ b :: l ↔ a = b ∨ a ∈ l :=
  ⟨fun h => match h with
    | .head _ => .inl rfl
    | .tail _ h => .inr h,
   fun h => match h with
    | .inl e => e ▸ Mem.head l
    | .inr h => Mem.tail b h⟩
theorem mem_cons_self {a : α} {l : List α} : a ∈ a :: l := Mem.head l
theorem mem_cons_of_mem (b : α) {a : α} {l : List α} (h : a ∈ l) : a ∈ b :: l := Mem.tail b h
theorem mem_singleton {a b : α} : a ∈ [b] ↔ a = b := by simp
@[simp] theorem mem_append {a : α} {l m : List α} : a ∈ l ++ m ↔ a ∈ l ∨ a ∈ m := by
  induction l with
  | nil => simp
  | cons b l ih => rw [cons_append, mem_cons, mem_cons, ih, or_assoc]
@[simp] theorem mem_reverse {a : α} {l : List α} : a ∈ reverse l ↔ a ∈ l := by
  induction l with
  | nil => simp
  | cons b l ih => rw [reverse_cons, mem_append, ih, mem_singleton, mem_cons, or_comm]
@[simp] theorem mem_map {f : α → β} {b : β} {l : List α} : b ∈ map f l ↔ ∃ a, a ∈ l ∧ f a = b := by
  induction l with
  | nil => simp
  | cons c l ih =>
    rw [map_cons, mem_cons, ih]
    constructor
    · intro h
      cases h with
      | inl h => exact ⟨c, .head l, h.symm⟩
      | inr h => exact h.elim fun a h => ⟨a, .tail c h.1, h.2⟩
    · intro h
      cases h with
      | intro a h =>
        cases h.1 with
        | head => exact .inl h.2.symm
        | tail _ m => exact .inr ⟨a, m, h.2⟩
@[simp] theorem mem_filter {p : α → Bool} {a : α} {l : List α} : a ∈ filter p l ↔ a ∈ l ∧ p a = true := by
  induction l with
  | nil => simp
  | cons b l ih =>
    rw [filter_cons]
    by_cases h : p b = true
    · rw [if_pos h, mem_cons, ih, mem_cons]
      constructor
      · intro x
        cases x with
        | inl e => exact ⟨.inl e, e ▸ h⟩
        | inr x => exact ⟨.inr x.1, x.2⟩
      · intro x
        cases x.1 with
        | inl e => exact .inl e
        | inr m => exact .inr ⟨m, x.2⟩
    · rw [if_neg h, ih, mem_cons]
      constructor
      · exact fun x => ⟨.inr x.1, x.2⟩
      · intro x
        cases x.1 with
        | inl e => exact absurd (e ▸ x.2) h
        | inr m => exact ⟨m, x.2⟩
theorem append_of_mem {a : α} {l : List α} (h : a ∈ l) : ∃ s t, l = s ++ a :: t := by
  induction l with
  | nil => exact nomatch h
  | cons b l ih =>
    cases h with
    | head => exact ⟨[], l, rfl⟩
    | tail _ m => exact (ih m).elim fun s e => e.elim fun t e => ⟨b :: s, t, by rw [e]; rfl⟩
instance decidableMem [DecidableEq α] (a : α) : (l : List α) → Decidable (a ∈ l)
  | [] => isFalse (not_mem_nil a)
  | b :: l =>
    match (inferInstance : Decidable (a = b)), decidableMem a l with
    | isTrue e, _ => isTrue (mem_cons.mpr (.inl e))
    | isFalse _, isTrue m => isTrue (.tail b m)
    | isFalse n, isFalse m => isFalse fun h => (mem_cons.mp h).elim n m
theorem all_eq_true {p : α → Bool} {l : List α} : all p l = true ↔ ∀ x, x ∈ l → p x = true := by
  induction l with
  | nil => simp
  | cons a l ih =>
    rw [all_cons, Bool.and_eq_true, ih]
    constructor
    · intro h x m
      cases m with
      | head => exact h.1
      | tail _ m => exact h.2 x m
    · exact fun h => ⟨h a (.head l), fun x m => h x (.tail a m)⟩
end List
instance {α : Type u} {β : Type v} [DecidableEq α] [DecidableEq β] : DecidableEq (α × β) := fun p q =>
  decidable_of_iff (p.1 = q.1 ∧ p.2 = q.2) ⟨fun h => Prod.ext h.1 h.2, fun h => h ▸ ⟨rfl, rfl⟩⟩
instance {α : Type u} [DecidableEq α] : DecidableEq (Option α)
  | none, none => isTrue rfl
  | none, some _ => isFalse fun h => nomatch h
  | some _, none => isFalse fun h => nomatch h
  | some a, some b => decidable_of_iff (a = b) Option.some_inj.symm
