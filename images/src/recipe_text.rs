//! The text of the built-in recipes (`images/recipes/`), as it is inside the program. Pure.

/// Scripts all recipes share, in the order they run.
pub const COMMON: CommonScripts = CommonScripts {
    kernel: include_str!("../recipes/common/kernel.sh"),
    files: include_str!("../recipes/common/files.sh"),
    finish: include_str!("../recipes/common/finish.sh"),
};

/// See [`COMMON`].
pub struct CommonScripts {
    pub kernel: &'static str,
    pub files: &'static str,
    pub finish: &'static str,
}

/// The text of one recipe.
pub struct RecipeSource {
    /// Its name.
    pub name: &'static str,
    /// `recipe.toml`.
    pub toml: &'static str,
    /// See `Recipe::customize`.
    pub customize: &'static str,
    /// See `Recipe::files`.
    pub files: &'static [(&'static str, &'static str)],
}

/// The built-in recipes, the default one first.
pub const SOURCES: [RecipeSource; 3] = [
    RecipeSource { name: "sandbox", toml: include_str!("../recipes/sandbox/recipe.toml"), customize: "", files: &[] },
    RecipeSource {
        name: "debian-12",
        toml: include_str!("../recipes/debian-12/recipe.toml"),
        customize: include_str!("../recipes/debian-12/customize.sh"),
        files: &[(
            "etc/systemd/system/nido-guest-agent.service",
            include_str!("../recipes/debian-12/nido-guest-agent.service"),
        )],
    },
    RecipeSource {
        name: "kvm-host",
        toml: include_str!("../recipes/kvm-host/recipe.toml"),
        customize: include_str!("../recipes/kvm-host/customize.sh"),
        files: &[],
    },
];

/// Names of the built-in recipes, the default one first.
pub fn names() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().map(|source| source.name)
}
